"""The cluster itself, after something happened to all of it."""

import json
import os
import signal

import pytest
from scheduled import devcluster


@pytest.mark.usefixtures("dev")
def test_what_is_left_of_a_cluster_that_died_is_cleared_away() -> None:
    before = _status()
    for process in before["daemons"].values():
        os.kill(process, signal.SIGKILL)
    dead = _status()
    assert (dead["up"], dead["daemons"], dead["nodes"]) == (False, {}, {})
    done = devcluster("up")
    assert done.returncode == 0, done.stderr
    after = _status()
    assert after["up"]
    assert after["nodes"].keys() == before["nodes"].keys()


def _status() -> dict:
    return json.loads(devcluster("status").stdout)
