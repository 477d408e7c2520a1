"""What became of an attempt, as its folder tells."""

import re
import signal
from pathlib import Path

from msgspec import Struct

from ftlaunch.run.files import read_json
from ftlaunch.run.layout import Attempt, StageDir
from ftlaunch.run.records import Failure, Stopped

TAIL_LINES = 20
SHOWN_LINES = 8

ECHO = "PeerDied"
"""Type of an error that only says that another rank is dead: the launch log knows of what."""


class Done(Struct, frozen=True):
    """The stage has its result."""


Outcome = Done | Stopped | Failure


def read_outcome(stage_dir: StageDir, attempt: Attempt) -> Outcome | None:
    """How the newest attempt of a stage ended; None while, or where, nobody has said so."""
    # The result comes first: it is written last, so whatever else an attempt left no longer matters.
    if stage_dir.result.exists():
        return Done()
    return read_json(attempt.stopped, Stopped) or read_failure(attempt)


def read_failure(attempt: Attempt) -> Failure | None:
    """The first error of an attempt, if one was written down."""
    return read_json(attempt.error, Failure)


# The summary of torch elastic: "rank      : 1 (local_rank: 1)", and in the next line "exitcode  : -9 (pid: 4711)".
ELASTIC_FAILURE = re.compile(r"rank +: (\d+) \(local_rank: \d+\)\s+exitcode +: (-?\d+) \(pid: \d+\)")
# Its log, where the summary is missing: "failed (exitcode: -9) local_rank: 1 (pid: 4711) of binary: …".
ELASTIC_FAILED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")
# accelerate starts a single rank without torch elastic. It ends with a CalledProcessError: "Command … died with
# <Signals.SIGKILL: 9>." or "Command … returned non-zero exit status 3."
SINGLE_DIED = re.compile(r"died with <Signals\.\w+: (\d+)>")
SINGLE_FAILED = re.compile(r"returned non-zero exit status (\d+)")

# torch's store: "… has failed to listen on any local network address. port: 57491, …, name: EADDRINUSE, message: …".
PORT_TAKEN = re.compile(r"port: (\d+),.* name: EADDRINUSE")
TAKEN = "EADDRINUSE"

LAUNCHER_TRACEBACK = re.compile(r'^Traceback \(most recent call last\):\n  File "[^"\n]*/accelerate"', re.MULTILINE)


def tell_death(attempt: Attempt, exit_code: int) -> Failure:
    """The error of an attempt whose ranks left none: who died of what, from the launch log and its exit code."""
    rank, code = _first_death(attempt) or (None, exit_code)
    log = _death_log(attempt, rank)
    launch_log = attempt.launch_log.read_text(errors="replace")
    if (taken := PORT_TAKEN.search(launch_log)) is not None:
        how, remedy = TAKEN, ANOTHER_PORT
        message = f"another process took port {taken[1]} before this run's processes could meet there"
    else:
        how, message = _signal_name(-code) if code < 0 else f"exit code {code}", _death_message(rank, code)
        remedy = MEMORY if code == -signal.SIGKILL else None
        if remedy and OUT_OF_MEMORY in launch_log:
            message, remedy = f"{message}, as the kernel ran out of memory for it", MORE_MEMORY
    return Failure(rank=rank, type=how, message=message, remedy=remedy, traceback=_last_words(log), log=str(log))


OUT_OF_MEMORY = "ftlaunch: the kernel has killed processes here for lack of memory\n"
"""Line at the end of a launch log where that was so while the attempt lived."""
LESS = "a smaller micro_batch_size or max_length, or activation_checkpointing = true"
MORE_MEMORY = f"{LESS}; on a cluster, more memory_per_node in the profile"
MEMORY = f"if nobody killed it, the machine ran out of memory (`dmesg` says so): {LESS}"

ANOTHER_PORT = "start it again with `ftlaunch resume`: each start chooses another port"


def name_cause(failure: Failure, attempt: Attempt) -> Failure:
    """The error itself; for a mere echo of a dead peer, what that peer died of where the launch log knows."""
    if failure.type != ECHO or _first_death(attempt) is None:
        return failure
    return tell_death(attempt, 1)


def tell_signal(attempt: Attempt, exit_code: int) -> Failure | None:
    """What a rank, or the launching process, was killed by from outside; None where nothing was."""
    _, code = _first_death(attempt) or (None, exit_code)
    return tell_death(attempt, exit_code) if code < 0 and code != -signal.SIGTERM else None


def _first_death(attempt: Attempt) -> tuple[int, int] | None:
    """Global rank and exit code (a negative signal) of the process that died first, by this node's launch log."""
    text = attempt.launch_log.read_text(errors="replace")
    root_cause = text.rpartition("Root Cause")[2]
    if found := ELASTIC_FAILURE.search(root_cause):
        return int(found[1]), int(found[2])
    if found := ELASTIC_FAILED.search(text):
        parallel = attempt.stage_dir.read_spec().parallel
        return parallel.ranks_of(attempt.node)[int(found[2])], int(found[1])
    if found := SINGLE_DIED.search(text):
        return 0, -int(found[1])
    if found := SINGLE_FAILED.search(text):
        return 0, int(found[1])
    return None


def _death_message(rank: int | None, code: int) -> str:
    if code < 0:
        return f"{'the launching process was ' if rank is None else ''}killed by {_signal_name(-code)}"
    who = "the launching process " if rank is None else ""
    return f"{who}ended with exit code {code} and left no word of what happened"


def _signal_name(number: int) -> str:
    named = {one.value: one.name for one in signal.Signals}
    return named.get(number, f"signal {number}")


def _death_log(attempt: Attempt, rank: int | None) -> Path:
    if rank is not None and (log := attempt.rank_log(rank)).exists() and log.stat().st_size:
        return log
    return attempt.launch_log


def _last_words(log: Path) -> str:
    """The last lines of a log, without accelerate's own traceback: it only says that a process ended."""
    text = log.read_text(errors="replace")
    said = LAUNCHER_TRACEBACK.split(text)[0].strip() or text
    return "\n".join(said.splitlines()[-TAIL_LINES:])


def peers_are_being_ended(attempt: Attempt) -> bool:
    """Whether torch elastic lost a rank and is asking the others to leave; not so when it was itself asked to."""
    text = attempt.launch_log.read_text(errors="replace")
    # A rank died: "Sending process 4711 closing signal SIGTERM" for each peer. If torch elastic itself was asked to
    # leave, "Received 15 death signal, shutting down workers" comes first.
    return "closing signal" in text and "death signal" not in text


def describe_failure(failure: Failure, *, in_full: bool = False) -> str:
    """The error for a person who watches, with the end of its traceback unless the mistake is the user's.

    `in_full`: for one who looks into it, with the whole traceback.
    """
    traceback = failure.traceback.rstrip().splitlines()
    if not in_full:
        traceback = [] if failure.user_error else traceback[-SHOWN_LINES:]
    says_all = failure.user_error or failure.type in failure.message
    what = failure.message if says_all else f"{failure.type}: {failure.message}"
    remedy = [f"  → {failure.remedy}"] if failure.remedy else []
    return "\n".join(
        [f"error: {failure.who}{what}", *(f"    {line}" for line in traceback), *remedy, f"  log: {failure.log}"]
    )
