"""Where the processes of a stage meet."""

import socket
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from ftlaunch.processes.outcome import TAKEN, tell_death
from ftlaunch.run.layout import Attempt


def test_a_port_that_was_taken_after_it_was_chosen_is_named_with_the_remedy(tmp_path: Path):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match="EADDRINUSE") as failed:
            TCPStore("127.0.0.1", port, 1, is_master=True)
    attempt = Attempt(tmp_path / "1")
    attempt.path.mkdir()
    attempt.launch_log.write_text(f"Traceback (most recent call last):\n  …\n{failed.value}\n")
    failure = tell_death(attempt, 1)
    assert failure.type == TAKEN
    assert f"another process took port {port}" in failure.message
    assert "ftlaunch resume" in (failure.remedy or "")
