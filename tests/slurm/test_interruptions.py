"""A few of the interruptions that `make interruptions` makes by the dozen: one of each verb, side by side."""

from pathlib import Path

import pytest
from interruptions import VERBS, make_trials


@pytest.mark.usefixtures("dev")
def test_a_call_that_is_interrupted_leaves_nothing_that_nobody_knows(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    count = 40 if request.config.getoption("--all-trials") else len(VERBS)
    told = list(make_trials(tmp_path, count, seed=16, at_once=4))
    assert not [line for line in told if line.startswith("WRONG")]
