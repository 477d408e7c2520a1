"""Which failures are worth another attempt."""

import pytest

from ftlaunch.backend.slurm.restart_policy import (
    FRUITLESS,
    AttemptRecord,
    is_peer_error,
    objection_after_failure,
    objection_after_preemption,
    ran_out_of_memory,
)
from ftlaunch.processes.outcome import TAKEN, Failure


def ended(
    step: int | None = 30, checkpoint: str | None = "step-20", restart: int = 0, cause: str = "failed"
) -> AttemptRecord:
    return AttemptRecord(
        job="1",
        restart=restart,
        nodes=["n1"],
        cause=cause,
        step=step,
        checkpoint=checkpoint,
        lost=[],
        restarted=True,
        reason="",
    )


def failure(kind: str = "SIGKILL", message: str = "killed by SIGKILL", *, user_error: bool = False) -> Failure:
    return Failure(rank=1, type=kind, message=message, log="l", user_error=user_error)


LOST_PEER = failure("RuntimeError", "[gloo] Connection closed by peer [10.0.0.1]:4711")


@pytest.mark.parametrize("what", [failure(), LOST_PEER, failure("Hang", "no step for 600 s"), failure(TAKEN, "port")])
@pytest.mark.parametrize("step", [None, 30])
def test_what_came_from_outside_is_tried_again(what: Failure, step: int | None) -> None:
    assert objection_after_failure(what, ended(step), [], 50) is None


@pytest.mark.parametrize("kind", ["OutOfMemoryError", "MemoryError"])
def test_memory_does_not_come_back(kind: str) -> None:
    assert objection_after_failure(failure(kind, "out of memory"), ended(), [], 50) == "it ran out of memory"


def test_a_mistake_of_the_user_stays_one() -> None:
    assert (
        objection_after_failure(failure("UserError", "no rows", user_error=True), ended(), [], 50)
        == "it would only fail again"
    )


def test_an_error_is_tried_again_once_steps_were_taken() -> None:
    what = failure("ValueError", "odd")
    assert objection_after_failure(what, ended(30), [], 50) is None
    assert objection_after_failure(what, ended(None, None), [], 50) == "it failed before its first step"


def test_the_same_place_twice_is_enough() -> None:
    assert (
        objection_after_failure(failure(), ended(30), [ended(30)], 50)
        == "it failed twice at the same place, after step 30"
    )


def test_no_checkpoint_since_the_last_failure_is_enough() -> None:
    assert (
        objection_after_failure(failure(), ended(35), [ended(30)], 50)
        == "it has made no checkpoint since the failure before"
    )
    assert objection_after_failure(failure(), ended(35, "step-30"), [ended(30)], 50) is None


def test_a_preemption_in_between_counts_as_no_failure() -> None:
    assert objection_after_failure(failure(), ended(35), [ended(30, cause="preempted")], 50) is None


def test_restarts_are_bounded() -> None:
    assert objection_after_failure(failure(), ended(restart=5), [], 5) == "it has been restarted 5 times (max_restarts)"


def test_who_is_sent_away_goes_on_later() -> None:
    assert objection_after_preemption(ended(), [], 50) is None
    earlier = [ended(checkpoint="step-10", cause="preempted") for _ in range(10)]
    assert objection_after_preemption(ended(), earlier, 50) is None
    assert objection_after_preemption(ended(restart=5), [], 5) == "it has been restarted 5 times (max_restarts)"


def test_starts_that_never_come_to_a_checkpoint_are_given_up() -> None:
    starts = [ended(None, None, cause="preempted") for _ in range(FRUITLESS)]
    assert objection_after_preemption(starts[0], starts[1:], 50) is None
    assert (objection_after_preemption(starts[0], starts, 50) or "").startswith(
        "4 starts in a row have made no checkpoint"
    )
    starts[1] = ended(None, None, cause="lost")  # of a node: more time would not have helped
    assert objection_after_preemption(starts[0], starts, 50) is None


ECHOES = (
    ("RuntimeError", "[gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.77.0.2]:4711"),
    ("DistBackendError", "NCCL error: remote process exited or there was a network error"),
    ("DistNetworkError", "The client socket has failed to connect to any network address of (n1, 12345)"),
    ("RuntimeError", "wait timeout after 1800000ms, keys: /default_pg/0//worker; TCPStore is gone"),
    ("PeerDied", "rank 1 died without a word"),
    ("BrokenPipeError", "[Errno 32] Broken pipe"),
)


@pytest.mark.parametrize(("kind", "message"), ECHOES)
def test_who_only_says_that_another_has_gone_is_told_apart(kind: str, message: str) -> None:
    assert is_peer_error(failure(kind, message))


@pytest.mark.parametrize("message", ["cannot restore the state", "no such store room", "a speer of websockets"])
def test_words_that_only_hold_such_words_are_no_echo(message: str) -> None:
    assert not is_peer_error(failure("RuntimeError", message))


@pytest.mark.parametrize(("message", "memory"), [("bigscience/bloom has no such layer", False), ("oom-kill", True)])
def test_a_model_called_bloom_is_not_out_of_memory(message: str, memory: bool) -> None:
    assert ran_out_of_memory(failure("RuntimeError", message)) is memory
