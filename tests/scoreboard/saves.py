"""Trials of whatever saves checkpoints. The measure is always the same: the weights at the end of an unbroken run."""

import os
import shutil
from pathlib import Path

import torch
from tests.scoreboard.child import Child, outcome
from tests.scoreboard.trial import Saver, Try, Verdict

STOP_AT = 6
REPEATS = 2
"""Kills at each file: a process takes a moment to die."""


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self._canary),)


def trials(saver: Saver) -> dict[str, Try]:
    """The trials that need nothing but a Saver."""
    return {
        "kill": lambda work: kill(saver, work),
        "flip weights": lambda work: damaged(saver, work, lambda newest: flip(saver.weights(newest))),
        "flip optimizer": lambda work: damaged(saver, work, lambda newest: flip(saver.optimizer(newest))),
        "truncate": lambda work: damaged(saver, work, lambda newest: truncate(saver.weights(newest))),
        "missing": lambda work: damaged(saver, work, lambda newest: saver.optimizer(newest).unlink()),
        "empty": lambda work: damaged(saver, work, empty),
        "pickle": lambda work: pickle(saver, work),
    }


def unbroken(saver: Saver, work: Path) -> str:
    """The digest of the weights at the end of a run that nothing disturbs."""
    said = outcome(lambda: saver.train(work / "calm"), work / "calm")
    assert "result" in said, said["error"]
    return said["result"]


def entries(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("*"))


def kill(saver: Saver, work: Path) -> Verdict:
    expected = unbroken(saver, work)
    first = work / "first"
    outcome(lambda: saver.train(first, stop_at=2), first)
    before = entries(saver.checkpoints(first)[0].parent)
    told: list[str] = []
    for number in range(1, before + 1):
        for repeat in range(REPEATS):
            run = work / f"{number}-{repeat}"
            if _killed(saver, run, before + number):
                told.append(_as_expected(expected, outcome(lambda run=run: saver.train(run), run)))
    return _count(told)


def _killed(saver: Saver, run: Path, when: int) -> bool:
    """Whether the run could be killed once its second save had so many files and folders on disk with the first's."""
    child = Child(lambda: saver.train(run), run)

    def is_there() -> bool:
        found = saver.checkpoints(run)
        return bool(found) and entries(found[0].parent) >= when

    return child.kill_when(is_there)


def _as_expected(expected: str, said: dict[str, str]) -> str:
    if "error" in said:
        return said["error"]
    return "exact" if said["result"] == expected else "other weights"


def _count(told: list[str]) -> Verdict:
    assert told, "nothing could be killed in time"
    exact, wrong = told.count("exact"), told.count("other weights")
    errors = [word for word in told if word not in ("exact", "other weights")]
    seen = f"{len(told)} kills: {exact} went on exactly"
    if wrong:
        seen += f", {wrong} went on with other weights and no word"
    if errors:
        seen += f", {len(errors)} stopped, most with {max(set(errors), key=errors.count)}"
    return Verdict("pass" if exact == len(told) else "FAIL", seen)


def damaged(saver: Saver, work: Path, damage) -> Verdict:
    """What comes of a run that is resumed after its newest checkpoint was damaged."""
    expected = unbroken(saver, work)
    run = work / "run"
    outcome(lambda: saver.train(run, stop_at=STOP_AT), run)
    damage(saver.checkpoints(run)[-1])
    said = outcome(lambda: saver.train(run), run)
    if "error" in said:
        return Verdict("stops", said["error"])
    if said["result"] == expected:
        return Verdict("pass", "the checkpoint before it was used; the end is the same")
    return Verdict("FAIL", "trained on with other weights, and no word")


def flip(path: Path) -> None:
    """One bit of a number in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 | 3] ^= 0x40  # the exponent of a little-endian fp32
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(newest: Path) -> None:
    for child in newest.iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()


def pickle(saver: Saver, work: Path) -> Verdict:
    run, canary = work / "run", work / "canary"
    outcome(lambda: saver.train(run, stop_at=STOP_AT), run)
    newest = saver.checkpoints(run)[-1]
    theirs = [path for path in newest.rglob("*") if path.suffix in {".pt", ".pth", ".bin", ".pkl"}]
    planted = theirs or [newest / name for name in saver.pickles]
    for path in planted:
        torch.save({"state": Payload(canary)}, path)
    said = outcome(lambda: saver.train(run), run)
    if canary.exists():
        return Verdict("FAIL", f"the payload ran ({', '.join(sorted({path.name for path in planted}))})")
    if "error" in said:
        return Verdict("stops", f"not run: {said['error']}")
    return Verdict("pass", "not run" if theirs else "nothing is unpickled")
