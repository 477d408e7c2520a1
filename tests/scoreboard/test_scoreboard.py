"""The committed table has a row for each trial and a verdict in each cell; ftlaunch's side of some trials is tried."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.scoreboard.table import STACKS, TABLE, experiments
from tests.scoreboard.trial import TRIALS

WORDS = r"\*\*(pass|stops|FAIL|n/a|not built yet)\*\*"


def rows() -> dict[str, list[str]]:
    """Cells of each row of the table, by its question."""
    lines = [line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    return {question: cells for question, *cells in lines[2:]}


def test_the_table_tells_of_every_trial_and_stack(tmp_path: Path):
    found = rows()
    assert list(found) == [trial.question for trial in TRIALS]
    tried = experiments(tmp_path)
    assert set(tried) == set(STACKS)
    assert set().union(*tried.values()) == {trial.key for trial in TRIALS}
    for trial in TRIALS:
        cells = dict(zip(STACKS, found[trial.question], strict=True))
        for stack, cell in cells.items():
            word = re.match(WORDS, cell)[1]
            assert (word == "n/a") == (trial.key not in tried[stack]), f"{trial.key}, {stack}: make scoreboard"


@pytest.mark.parametrize("trial", ["flip weights", "empty", "pickle"])
def test_ftlaunch_passes(trial: str):
    command = [sys.executable, "-m", "tests.scoreboard", "--stack", STACKS[0], "--trial", trial]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=TABLE.parents[2], env=os.environ)
    assert "**pass**" in done.stdout
