"""Experiments in forked processes: torch and the stacks are imported once, and what is killed is a real process."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 60.0
"""Seconds for a child to end by itself."""
POLL = 0.0005
LONGEST = 110
"""Characters of an error that are told."""


class Child:
    """A forked process in a group of its own that runs a function and tells its result, or the error, in a file."""

    def __init__(self, act: Callable[[], str], folder: Path, **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._said = folder / "said.json"
        self._said.unlink(missing_ok=True)
        self.pid = os.fork()
        if self.pid == 0:
            self._be(act, folder, environment)

    def _be(self, act: Callable[[], str], folder: Path, environment: dict[str, str]) -> None:
        os.setpgid(0, 0)
        os.environ.update(environment)
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            said = {"result": act()}
        except BaseException as error:  # noqa: BLE001 whatever it is, it is what came of the experiment
            said = {"error": _in_short(error)}
        self._said.write_text(json.dumps(said))
        os._exit(0)

    def ended(self) -> bool:
        """Whether it has, without waiting."""
        if self.pid == 0:
            return True
        if os.waitpid(self.pid, os.WNOHANG)[0]:
            self.pid = 0
            return True
        return False

    def wait(self, seconds: float = PATIENCE) -> bool:
        """Whether it ended within that time."""
        deadline = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def kill_when(self, condition: Callable[[], bool]) -> bool:
        """SIGKILL the process and its children as soon as the condition holds; False where it ended first."""
        while not self.ended():
            if condition():
                self.kill()
                return True
            time.sleep(POLL)
        return False

    def kill(self) -> None:
        if self.pid:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def said(self) -> dict[str, str]:
        """Its "result" or its "error"."""
        if not self._said.exists():
            return {"error": "it ended without a word"}
        return json.loads(self._said.read_text())


def _in_short(error: BaseException) -> str:
    """Its type and the first line of what it says, without folders."""
    told = re.sub(r"/\S*/(?=[^/\s]+)", "", str(error).strip().partition("\n")[0])
    return f"{type(error).__name__}: {told}"[:LONGEST].rstrip(": ")


def outcome(act: Callable[[], str], folder: Path, **environment: str) -> dict[str, str]:
    """What a function in a child of its own returns or raises."""
    sys.stdout.flush()
    child = Child(act, folder, **environment)
    if not child.wait():
        child.kill()
        return {"error": f"it hung for {PATIENCE:.0f} s"}
    return child.said()
