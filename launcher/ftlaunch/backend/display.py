"""What a person sees while stages run, on stderr: a progress bar on a terminal, plain lines elsewhere."""

import os
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TextIO

from ftlaunch.processes.signals import detach_output
from ftlaunch.run.progress import WINDOW, Entry, describe, is_evaluation, seconds_left

EVERY_STEPS = 10
EVERY_SECONDS = 10.0
AT_MOST_EVERY = 1.0


class Display(ABC):
    """Where a driver shows how a run goes."""

    def __init__(self) -> None:
        self._stage = ""
        self._window: deque[Entry] = deque(maxlen=WINDOW)

    @abstractmethod
    def say(self, text: str) -> None:
        """Show lines of text."""

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """While this is open, `show` is about that stage."""
        self._stage = name
        self._window.clear()
        yield

    @abstractmethod
    def prepare(self, text: str) -> None:
        """What the stage is at before its first step."""

    def show(self, entries: Sequence[Entry]) -> None:
        """New entries of the stage's metrics."""
        for entry in entries:
            if is_evaluation(entry):
                self.say(f"{self._stage}  {describe(entry, None)}")
            else:
                self._window.append(entry)
                self._show_step(entry)

    @abstractmethod
    def _show_step(self, entry: Entry) -> None:
        """Show an optimizer step, which is the newest of the window by now."""


def open_display(stream: TextIO | None = None) -> Display:
    """The display that suits a stream, which is stderr where none is given."""
    stream = stream or sys.stderr
    assert stream is not None
    # TERM=dumb is a terminal, such as Emacs' shell, that prints the bar's escape sequences instead of obeying them.
    can_move = stream.isatty() and os.environ.get("TERM") != "dumb"
    return BarDisplay(stream) if can_move else PlainDisplay(stream)


class PlainDisplay(Display):
    """Lines for a log: the first step, the last, evaluations, and in between one every ten steps or ten seconds."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._stream = stream
        self._clock = clock
        self._shown_step = 0
        self._shown_time = 0.0

    def say(self, text: str) -> None:
        try:
            print(text, file=self._stream, flush=True)
        except BrokenPipeError:
            detach_output()  # a reader that has left is no reason to lose a run

    def prepare(self, text: str) -> None:
        if self._clock() - self._shown_time >= EVERY_SECONDS:
            self._shown_time = self._clock()
            self.say(f"{self._stage}  {text}")

    def _show_step(self, entry: Entry) -> None:
        if self._is_due(entry):
            self._shown_step, self._shown_time = entry["step"], self._clock()
            self.say(f"{self._stage}  {describe(entry, seconds_left(self._window))}")

    def _is_due(self, entry: Entry) -> bool:
        if len(self._window) == 1 or entry["step"] == entry.get("steps"):
            return True
        waited = self._clock() - self._shown_time
        enough = entry["step"] - self._shown_step >= EVERY_STEPS or waited >= EVERY_SECONDS
        # Tiny models take hundreds of steps a second; a line for every ten of them would still flood the log.
        return enough and waited >= AT_MOST_EVERY


class BarDisplay(Display):
    """A bar for the stage that runs; evaluations and finished stages stay above it as lines."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        super().__init__()
        # With markup, rich would drop words in brackets, such as the [sweep] of an error message.
        self._console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self._update: Callable[..., None] | None = None
        """Changes what the bar of the stage shows."""

    def say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn(name), BarColumn(bar_width=24), TextColumn("{task.description}"))
        # transient: the bar disappears when its stage ends, and only the lines from `say` stay on the screen.
        bar = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True)
        with super().stage(name), bar:
            self._update = partial(bar.update, bar.add_task("starting", total=None))
            yield

    def prepare(self, text: str) -> None:
        if self._update:
            self._update(description=text)

    def _show_step(self, entry: Entry) -> None:
        if self._update:
            text = describe(entry, seconds_left(self._window))
            self._update(description=text, completed=entry["step"], total=entry.get("steps"))
