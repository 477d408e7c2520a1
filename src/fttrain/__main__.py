"""`python -m fttrain NN-kind`: run the step in a folder, as one rank of the process group that started it."""

import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from ftlaunch.errors import BAD_INPUT, DONE, STAGE_FAILED, STOPPED, UserError
from ftlaunch.run import snapshot
from ftlaunch.run.changes import require_unchanged
from ftlaunch.run.files import write_first, write_json
from ftlaunch.run.layout import ATTEMPT, NODE_FOLDER, Attempt, StageDir
from ftlaunch.run.records import Failure, Result, Stopped
from ftlaunch.run.spec import StageSpec
from ftlaunch.safety import trust
from ftlaunch.safety.redact import redact, redact_output

DYING_SECONDS = 2.0


def main() -> int:
    """Run the step and leave its outcome in files; the exit code says the same."""
    folder = StageDir(Path(sys.argv[1]).absolute())
    redact_output()
    trust.write_for_ourselves()
    rank = int(os.environ.get("RANK", "0"))
    attempt = _attempt(rank)
    try:
        return _run(folder, attempt)
    except Exception as error:  # noqa: BLE001 the outermost frame: whatever ends a rank is reported by it
        traceback.print_exc()
        report(error, rank, attempt)
        return BAD_INPUT if isinstance(error, UserError) else STAGE_FAILED


def _attempt(rank: int) -> Attempt | None:
    """The attempt's folder, with this rank's output going to its log there; None when started by hand."""
    path = os.environ.get(ATTEMPT)
    if path is None:
        return None
    attempt = Attempt(Path(path))
    attempt.local = Path(local) if (local := os.environ.get(NODE_FOLDER)) else None
    descriptor = os.open(attempt.rank_log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.register(signal.SIGQUIT)  # a rank that hangs is asked with it where it is
    return attempt


def _run(folder: StageDir, attempt: Attempt | None) -> int:
    trust.require(folder.path.parent)
    trust.require(folder.path)
    if os.environ.get("RANK", "0") == "0":  # also where SLURM goes on with a stage by itself
        require_unchanged(folder.run)
    step = snapshot.redirect(folder.read_spec(), folder.run)
    from fttrain.data import pins
    from fttrain.distributed import precision
    from fttrain.distributed import world as worlds  # torch and accelerate, after the output is where it belongs
    from fttrain.distributed.stop_request import StoppedEarly, StopRequest

    world = worlds.start(step)
    step = pins.settle(precision.settle(step, folder, world), folder.run.commits, world)
    beat = attempt.beat(world.rank) if attempt else None
    stop = StopRequest(folder.stop if world.is_main else None, world.dead_peers, beat)
    try:
        result = _stage(step)(step, folder, world, stop)
    except StoppedEarly as stopped:
        if world.is_main and attempt is not None:
            write_json(attempt.stopped, Stopped(reason=stopped.reason, step=stopped.step))
        worlds.leave(world)
        return STOPPED
    except UserError:
        raise
    # Each collective fails in its own way where a peer is gone: RuntimeError, DistBackendError, ValueError and others.
    except Exception as error:
        dead = _dead_soon(world.dead_peers)
        if dead:
            raise PeerDied(dead[0], world.peers[dead[0]][1]) from error
        raise
    if world.is_main:
        write_json(folder.result, result)
    worlds.leave(world)
    return DONE


def _dead_soon(dead_peers: Callable[[], list[int]]) -> list[int]:
    """Ranks that have died, or are about to be gone: a connection breaks a moment before its process has ended."""
    deadline = time.monotonic() + DYING_SECONDS
    while not (dead := dead_peers()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return dead


class PeerDied(Exception):
    """Another rank of this host ended without a word, so what failed here is only the echo."""

    def __init__(self, rank: int, pid: int) -> None:
        super().__init__(f"rank {rank} (pid {pid}) died without a word: killed, perhaps for want of memory")
        self.rank = rank


def _stage(spec: StageSpec) -> Callable[..., Result]:
    import importlib

    kind = spec.stage.__struct_config__.tag
    return importlib.import_module(f"fttrain.stages.{kind}").run


def report(error: Exception, rank: int, attempt: Attempt | None) -> None:
    """Leave error.json, unless another rank was first."""
    if attempt is None:
        return
    rank = error.rank if isinstance(error, PeerDied) else rank
    is_user_error = isinstance(error, UserError)
    failure = Failure(
        rank=rank,
        type=type(error).__name__,
        message=_clean(error.message if is_user_error else str(error)),
        remedy=_clean(error.remedy) if is_user_error else None,
        traceback=_clean(traceback.format_exc()),
        log=str(attempt.rank_log(rank)),
        user_error=is_user_error,
    )
    if not write_first(attempt.error, failure):
        print("another rank has reported the first error", file=sys.stderr)


def _clean(text: str) -> str:
    """The text without secrets, and without what JSON cannot hold, such as bytes of a file's name that are no text."""
    return redact(text).encode(errors="backslashreplace").decode()


if __name__ == "__main__":
    sys.exit(main())
