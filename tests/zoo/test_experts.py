"""Adapters of stacked experts: merged, resumed bit for bit, sharded over two ranks, off for the reference of DPO."""

from pathlib import Path

import pytest
from tests.faults.ranks import Ranks
from tests.zoo.trials import Trials


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_experts_are_adapted_as_any_other_layer(name: str, ranks: Ranks, tmp_path: Path) -> None:
    Trials(name, tmp_path, ranks).experts()
