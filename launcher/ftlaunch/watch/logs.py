"""What the processes of a run said: all ranks of an attempt in one stream, followed while they speak."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ftlaunch.backend import backends
from ftlaunch.backend.runs import find_stage
from ftlaunch.errors import UserError
from ftlaunch.processes import Identity
from ftlaunch.processes.outcome import Failure, read_failure
from ftlaunch.run.layout import Attempt, RunDir, StageDir
from ftlaunch.run.tail import Tail
from ftlaunch.watch.status import read_status

FOLLOW_SECONDS = 0.2


def choose(run: RunDir, stage: str | None, number: int | None) -> Attempt | None:
    """The attempt asked for, by default the latest of the newest started stage; None where nothing has started yet.

    UserError where there is no such stage or attempt.
    """
    started = [step for step in _stages(run, stage) if step.all_attempts()]
    if not started:
        return None
    attempts = started[-1].all_attempts()
    found = [attempt for attempt in attempts if number in {None, attempt.number}]
    if not found:
        raise UserError(f"{started[-1].name} has no attempt {number}", f"it has attempts 1 to {len(attempts)}")
    return found[-1]


def read(
    run: RunDir, stage: str | None, number: int | None, rank: int | None, node: str | None = None
) -> Iterator[str]:
    """Every line of an attempt so far, one rank after the other. UserError where there is no such log or node.

    Where a job died before it could make an attempt: what that job said.
    """
    if number is None and rank is None and (said := [*_words_of_job(run, stage)]):
        yield from said
        return
    attempt = choose(run, stage, number)
    if attempt is None:
        raise UserError(f"{stage or run.path.name} has not started yet", "wait for it with -f")
    if rank is not None and rank not in attempt.rank_logs():
        ranks = ", ".join(map(str, attempt.rank_logs())) or "none yet"
        raise UserError(f"rank {rank} has no log in {attempt.path}", f"ranks with a log: {ranks}")
    if node is not None and node not in (hosts := _hosts(attempt)).values():
        raise UserError(f"nothing of {attempt.path} ran on {node}", f"it ran on {', '.join(hosts.values()) or 'none'}")
    voices = _LogStreams(attempt, rank, node)
    yield from voices.read_new()
    yield from voices.unfinished_line()


def _hosts(attempt: Attempt) -> dict[int, str]:
    """The name, without its domain, of each node that an attempt has been started on, by number; the first is 0."""
    # process.json is the first node's, process1.json the second's.
    found = {int(path.stem.removeprefix("process") or 0): path for path in attempt.path.glob("process*.json")}
    who = {number: msgspec.json.decode(found[number].read_bytes(), type=Identity) for number in sorted(found)}
    return {number: one.host.partition(".")[0] for number, one in who.items()}


def follow(
    run: RunDir, stage: str | None, number: int | None, rank: int | None, node: str | None = None
) -> Iterator[str]:
    """Lines as they are written, over all stages that are still to come (or of the one asked for), to the run's end."""
    voices: _LogStreams | None = None
    queue_watch = _QueueWatch(run)
    while True:
        over = queue_watch.is_over(nothing_said=voices is None)  # first, so that what was said until then is heard
        attempt = choose(run, stage, number)
        # Another attempt or the next stage has begun. The old one may have written more since the last look.
        if attempt and (voices is None or attempt.path != voices.attempt.path):
            if voices:
                yield from voices.read_new()
                yield from voices.unfinished_line()
            voices = _LogStreams(attempt, rank, node)
            print(f"── {attempt.stage_dir.name}, attempt {attempt.number}", file=sys.stderr, flush=True)
        if voices:
            yield from voices.read_new()
        if over:
            yield from voices.unfinished_line() if voices else _words_of_job(run, stage)
            return
        time.sleep(FOLLOW_SECONDS)


class _QueueWatch:
    """Asked all along whether a run is over, which it looks up now and then; says on stderr what the run waits for."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._asked = float("-inf")
        self._over = False
        self._last_said: str | None = None

    def is_over(self, *, nothing_said: bool) -> bool:
        # Looked up every time: `resume --cluster` may move the run to another backend while it is followed.
        backend = backends.of(self._run)
        if time.monotonic() - self._asked >= backend.patience:
            self._over, self._asked = backend.is_over(self._run), time.monotonic()
            if nothing_said and backend.patience and (told := _why_not_yet(self._run)) != self._last_said:
                self._last_said = told
                print(f"── {told}", file=sys.stderr, flush=True)
        return self._over


def _words_of_job(run: RunDir, stage: str | None) -> Iterator[str]:
    """What a job said that died before any process could."""
    early = _died_early(run, stage)
    yield from (f"[job] {line}" for line in early.traceback.splitlines()) if early else ()


def _why_not_yet(run: RunDir) -> str | None:
    """What a run waits for that has said nothing yet; None where nothing is known of that."""
    stage = next((stage for stage in read_status(run).stages if stage.state != "done"), None)
    return f"{stage.name} is {stage.state}{f': {stage.note}' if stage.note else ''}" if stage else None


class _LogStreams:
    """The logs of one attempt, ranks that join later included."""

    def __init__(self, attempt: Attempt, rank: int | None, node: str | None) -> None:
        self.attempt = attempt
        self._rank = rank
        self._node = node
        self._tails: dict[str, Tail] = {}

    def read_new(self) -> Iterator[str]:
        """Lines that are new since the last call."""
        for name, path in self._logs().items():
            tail = self._tails.setdefault(name, Tail(path))
            # A read gives about 1 MB at most, so that a long log is never in memory as a whole.
            while lines := tail.read():
                yield from (f"[{name}] {line}" for line in lines)

    def unfinished_line(self) -> Iterator[str]:
        """What was begun and will not be ended."""
        for name, tail in self._tails.items():
            yield from (f"[{name}] {line}" for line in tail.last())

    def _logs(self) -> dict[str, Path]:
        ranks = {rank: path for rank, path in self.attempt.rank_logs().items() if self._rank in {None, rank}}
        launched = {} if self._rank is not None else self.attempt.launch_logs()
        if self._node is not None:
            per_node = self.attempt.stage_dir.read_spec().parallel.procs_per_node
            here = [number for number, host in _hosts(self.attempt).items() if host == self._node]
            # Ranks are numbered node by node: with 4 processes on each, ranks 4 to 7 are on node 1.
            ranks = {rank: path for rank, path in ranks.items() if rank // per_node in here}
            names = {"launch" if number == 0 else f"launch, node {number}" for number in here}
            launched = {name: path for name, path in launched.items() if name in names}
        return launched | {f"rank {rank}": path for rank, path in ranks.items()}


def first_error(run: RunDir, stage: str | None, number: int | None) -> Failure:
    """The error of the newest attempt that failed, among those asked for. UserError where none did.

    What a job died of before it could make an attempt comes first.
    """
    attempts = [attempt for step in _stages(run, stage) for attempt in step.all_attempts()]
    if number is None and (early := _died_early(run, stage)):
        return early
    for attempt in reversed(attempts):
        if number in {None, attempt.number} and (failure := read_failure(attempt)):
            return failure
    now = next((one for one in read_status(run).stages if one.state != "done"), None)
    stands = f"; {now.name} is {now.state}: {now.note}" if now and now.note else ""
    raise UserError(
        f"{run.path.name} has no error on record{stands}", f"see how it stands: ftlaunch status {run.in_shell}"
    )


def _died_early(run: RunDir, stage: str | None) -> Failure | None:
    """What ended the job of the stage asked for, or of the one whose turn it is, before its processes started."""
    step = next((step for step in _stages(run, stage) if not step.result.exists()), None)
    return backends.of(run).last_words(step) if step else None


def _stages(run: RunDir, name: str | None) -> list[StageDir]:
    """The stage of a name, or all of a run. UserError where there is none of that name."""
    stages = run.stage_dirs()
    return stages if name is None else [find_stage(run.path.name, stages, name)]
