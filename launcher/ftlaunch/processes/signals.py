"""Signals that ask a driver to stop its run: the first means save and leave, one more means now."""

import os
import signal
from types import FrameType
from typing import Literal, Self

from ftlaunch.errors import INTERRUPTED, STOPPED

StopLevel = Literal["go on", "stop", "kill"]


class StopSignals:
    """What signals have asked for so far. Within `with`, they only set this; whoever drives looks here and acts.

    SIGINT and SIGTERM ask for a stop, and the second of them for a kill. SIGHUP (the terminal has gone, often said
    twice) never asks for more than a stop. SIGQUIT asks for a kill at once. What the caller has ignored, as nohup does,
    stays ignored.
    """

    def __init__(self) -> None:
        self.wish: StopLevel = "go on"
        self.by_keyboard = False
        self._before: dict[int, signal.Handlers | int | None] = {}

    @property
    def exit_code(self) -> int:
        """The exit code of a run that ended because of these signals."""
        return INTERRUPTED if self.by_keyboard else STOPPED

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._hear)  # pyright: ignore[reportArgumentType]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        self.by_keyboard |= number == signal.SIGINT
        if number == signal.SIGHUP:
            detach_output()
            self.wish = "stop" if self.wish == "go on" else self.wish
        else:
            self.wish = "stop" if self.wish == "go on" and number != signal.SIGQUIT else "kill"


class PreemptionSignals:
    """Signals with which SLURM tells a job that it will end: SIGUSR2 and SIGTERM, however often they come."""

    NUMBERS = (signal.SIGUSR2, signal.SIGTERM)

    def __init__(self) -> None:
        self.heard: signal.Signals | None = None
        """The first of them."""

    def listen(self) -> None:
        """Listen from now on, and forget the handlers that were installed before."""
        for number in self.NUMBERS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, _: FrameType | None) -> None:
        self.heard = self.heard or signal.Signals(number)


def detach_output() -> None:
    """Let stdout and stderr lead nowhere: writing to a terminal that has gone is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
