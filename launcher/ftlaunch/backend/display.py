"""What a person sees while stages run, on stderr: a progress bar on a terminal, plain lines elsewhere."""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

from ftlaunch.processes.signals import detach_output
from ftlaunch.run.progress import WINDOW, Entry, describe, is_evaluation, seconds_left

EVERY_STEPS = 10
EVERY_SECONDS = 10.0
AT_MOST_EVERY = 1.0


class Display(Protocol):
    """Where a driver shows how a run goes."""

    def say(self, text: str) -> None:
        """Show lines of text."""
        ...

    def stage(self, name: str) -> AbstractContextManager[None]:
        """While this is open, `show` is about that stage."""
        ...

    def prepare(self, text: str) -> None:
        """What the stage is at before its first step."""
        ...

    def show(self, entries: Sequence[Entry]) -> None:
        """New entries of the stage's metrics."""
        ...


def open_display(stream: TextIO | None = None) -> Display:
    """The display that suits a stream, which is stderr where none is given."""
    stream = stream or sys.stderr
    assert stream is not None
    # TERM=dumb is a terminal, such as Emacs' shell, that prints the bar's escape sequences instead of obeying them.
    can_move = stream.isatty() and os.environ.get("TERM") != "dumb"
    return BarDisplay(stream) if can_move else PlainDisplay(stream)


class PlainDisplay:
    """Lines for a log: the first step, the last, evaluations, and in between one every ten steps or ten seconds."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._stage = ""
        self._window: deque[Entry] = deque(maxlen=WINDOW)
        self._shown_step: int | None = None
        self._shown_time = 0.0

    def say(self, text: str) -> None:
        try:
            print(text, file=self._stream, flush=True)
        except BrokenPipeError:
            detach_output()  # a reader that has left is no reason to lose a run

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        self._stage, self._shown_step = name, None
        self._window.clear()
        yield

    def prepare(self, text: str) -> None:
        if self._clock() - self._shown_time >= EVERY_SECONDS:
            self._shown_time = self._clock()
            self.say(f"{self._stage}  {text}")

    def show(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if is_evaluation(entry):
                self.say(f"{self._stage}  {describe(entry, None)}")
                continue
            self._window.append(entry)
            if self._is_due(entry):
                self._shown_step, self._shown_time = entry["step"], self._clock()
                self.say(f"{self._stage}  {describe(entry, seconds_left(self._window))}")

    def _is_due(self, entry: Entry) -> bool:
        if self._shown_step is None or entry["step"] == entry.get("steps"):
            return True
        waited = self._clock() - self._shown_time
        enough = entry["step"] - self._shown_step >= EVERY_STEPS or waited >= EVERY_SECONDS
        # Tiny models take hundreds of steps a second; a line for every ten of them would still flood the log.
        return enough and waited >= AT_MOST_EVERY


class BarDisplay:
    """A bar for the stage that runs; evaluations and finished stages stay above it as lines."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        # With markup, rich would drop words in brackets, such as the [sweep] of an error message.
        self._console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self._stage = ""
        self._window: deque[Entry] = deque(maxlen=WINDOW)
        self._update: Callable[[Entry], None] | None = None
        self._prepare: Callable[[str], None] | None = None

    def say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._stage = name
        self._window.clear()
        columns = (SpinnerColumn(), TextColumn(name), BarColumn(bar_width=24), TextColumn("{task.description}"))
        # transient: the bar disappears when its stage ends, and only the lines from `say` stay on the screen.
        with Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True) as bar:
            task = bar.add_task("starting", total=None)
            self._prepare = lambda text: bar.update(task, description=text)
            self._update = lambda entry: bar.update(
                task,
                description=describe(entry, seconds_left(self._window)),
                completed=entry["step"],
                total=entry.get("steps"),
            )
            yield

    def prepare(self, text: str) -> None:
        if self._prepare:
            self._prepare(text)

    def show(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if is_evaluation(entry):
                self.say(f"{self._stage}  {describe(entry, None)}")
            else:
                self._window.append(entry)
        if self._window and self._update:
            self._update(self._window[-1])
