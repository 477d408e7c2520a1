"""`python -m tests.zoo [FAMILY …]`: every family through every trial; without names it writes recipes/MODELS.md.

`--kept FILE` adds a line for each family that is done, and leaves out those that have one: what was cut off goes on,
and several processes may share the families out.
"""

import argparse
import contextlib
import fcntl
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tests.faults.ranks import Ranks
from tests.zoo.families import FAMILIES
from tests.zoo.page import PAGE, page
from tests.zoo.trials import NotApplicable, RanksFailed, Trials

from ftlaunch.errors import UserError


def said(trial: Callable[[], None], folder: Path) -> str:
    """Return "✓", "–" where there is nothing to try, or why not: a refusal, or an error that nobody has foreseen."""
    try:
        trial()
    except NotApplicable:
        return "–"
    except (UserError, RanksFailed) as error:
        return (error.message if isinstance(error, UserError) else str(error)).replace(str(folder / "model"), "MODEL")
    except Exception as error:  # noqa: BLE001 the page tells it
        traceback.print_exc()
        return f"error: {type(error).__name__}: {(str(error) or '?').splitlines()[0][:200]}"
    return "✓"


def tried(name: str, ranks: Ranks) -> dict[str, Any]:
    """What the page tells of a family: its rows, the share that is adapted, what each trial said, and CPU seconds."""
    folder, started = Path(tempfile.mkdtemp(prefix="zoo-")), time.process_time()
    try:
        trials = Trials(name, folder, ranks)
        columns: dict[str, str] = {}
        for column, trial in trials.of_columns().items():
            is_later = column in ("plan", "exact", "padded", "merge", "resume", "2 ranks") and columns["SFT"] != "✓"
            columns[column] = "–" if is_later else said(trial, folder)
        seconds = time.process_time() - started
        return {"family": name, "rows": trials.layout, "adapted": trials.adapted, "seconds": seconds, **columns}
    finally:
        shutil.rmtree(folder)


def every(names: list[str], kept: Path) -> Iterator[dict[str, Any]]:
    """Try the families that no other process has taken, with a line in the file for each; yield what is new."""
    ranks = Ranks(Path(tempfile.mkdtemp(prefix="zoo-cache-")), OMP_NUM_THREADS="1")
    with contextlib.closing(ranks):
        for name in names:
            if not _take(name, kept):
                continue
            line = tried(name, ranks)
            with kept.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line, ensure_ascii=False), file=sys.stderr, flush=True)
            yield line


def _take(name: str, kept: Path) -> bool:
    """Return whether nobody has taken the family yet, and take it."""
    with kept.with_suffix(".taken").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if name in file.read().splitlines():
            return False
        file.write(f"{name}\n")
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--kept", type=Path, default=Path(tempfile.mkdtemp(prefix="zoo-kept-")) / "families.jsonl")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    list(every(asked.families or list(FAMILIES), asked.kept))
    lines = {line["family"]: line for line in map(json.loads, asked.kept.read_text().splitlines())}
    made = page([lines[name] for name in FAMILIES if name in lines])
    print(made) if asked.families else PAGE.write_text(made)


if __name__ == "__main__":
    main()
