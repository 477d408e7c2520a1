"""Leaving early: requests to stop, agreed on by all ranks, told apart from the death of a peer."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

WATCH_SECONDS = 60.0


class StoppedEarly(Exception):
    """All ranks have saved and leave because somebody asked for it."""

    def __init__(self, reason: str, step: int) -> None:
        super().__init__(f"stopped after step {step}: {reason}")
        self.reason = reason
        self.step = step


class StopRequest:
    """Requests that this process save and leave.

    SIGUSR2, SIGTERM and the step folder's `stop` file ask for it. Torch elastic also sends SIGTERM when a peer has
    died; no save can succeed then, and a collective may never return, so a thread ends this process instead.
    """

    def __init__(self, stop_file: Path | None, dead_peers: Callable[[], list[int]], beat: Path | None = None) -> None:
        """`stop_file` is None on ranks that leave looking to another, because all ranks act on any rank's request.

        It lies on a file system that all ranks share; `beat`, whose time tells the launcher of life, need not.
        """
        self._stop_file = stop_file
        self._beat = beat
        self._dead_peers = dead_peers
        self._signal: str | None = None
        # Python runs signal handlers in the main thread between bytecodes, so never while it waits in a collective.
        # The wake-up descriptor gets each signal's number at once, and a thread reads it.
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._sockets = (ours, theirs)
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, name="leave", daemon=True).start()

    def poll(self) -> str | None:
        """Return why this rank was asked to stop, or None; called at every step, it also leaves a sign of life."""
        if self._beat is not None:
            with contextlib.suppress(OSError):  # a failing disk is reported by whoever writes checkpoints
                self._beat.touch()
        return self.pending()

    def pending(self) -> str | None:
        """Return the same, without a sign of life: for places where no step begins."""
        if self._signal is None and self._stop_file is not None and self._stop_file.exists():
            return "stop file"
        return self._signal

    def _on_signal(self, number: int, _frame: object) -> None:
        self._signal = signal.Signals(number).name

    def _watch(self) -> None:
        """Runs even while the main thread waits inside a collective, where Python's own handler cannot."""
        while True:
            received = self._sockets[0].recv(1)
            if received and received[0] == signal.SIGTERM:
                self._end_if_peer_died()

    def _end_if_peer_died(self) -> None:
        deadline = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < deadline:
            dead = self._dead_peers()
            if dead:
                time.sleep(2.0)  # the main thread may be about to report a better error
                print(f"rank {dead[0]} has died: leaving without a save", file=sys.stderr, flush=True)
                os._exit(1)
            time.sleep(0.2)
