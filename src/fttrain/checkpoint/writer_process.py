"""A rank's hold on the process that writes its checkpoints: one order at a time, answered when it is done."""

import json
import os
import subprocess
import sys
from typing import Any


class WriterProcess:
    """The writing process of this rank, started when it is first needed, and again if it has died."""

    def __init__(self, image: int) -> None:
        """`image` is the descriptor of the memory that it writes from."""
        self._image = image
        self._process: subprocess.Popen[bytes] | None = None
        self._said = b""

    def order(self, do: str, **details: Any) -> None:
        """Give the next order; the answer to the one before must have been taken."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **details}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return  # it has died; `answer` finds the closed pipe and says so

    def answer(self) -> dict[str, Any] | None:
        """Return the result of the order, with "error" if it failed; None while the process works on it."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        while (part := self._read(process.stdout.fileno())) is not None:
            if not part:
                return {"error": f"the process that writes checkpoints has ended (exit code {process.wait()})"}
            self._said += part
            if self._said.endswith(b"\n"):
                said, self._said = self._said, b""
                return json.loads(said)
        return None

    @staticmethod
    def _read(descriptor: int) -> bytes | None:
        try:
            return os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return None

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fttrain.checkpoint.writer", str(self._image), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self._image],
        )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self._said = b""
        return process

    def close(self) -> None:
        """End the process, which must have answered its last order."""
        if self._process is not None:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
