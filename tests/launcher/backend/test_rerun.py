"""A run is rerun from a stage on: what comes before is kept, what depends on it goes, and nothing else does."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ftlaunch import rules
from ftlaunch.backend import backends, runs
from ftlaunch.backend.prepare import prepare
from ftlaunch.backend.replan import obsolete_stages, rerun_from
from ftlaunch.errors import UserError
from ftlaunch.plan.plan import Plan, make_plan
from ftlaunch.rules import Loaded
from ftlaunch.run.layout import RunDir

RECIPE = """
name = "chain"
[model]
path = "./model"
[adapter]
kind = "lora"
[data.rows]
path = "rows.jsonl"
format = "text"
[data.pairs]
path = "pairs.jsonl"
format = "preference"
[[stage]]
kind = "sft"
data = "rows"
[[stage]]
kind = "dpo"
data = "pairs"
[[stage]]
kind = "reward"
data = "pairs"
start = "sft"
[[stage]]
kind = "merge"
start = "dpo"
"""
SFT, DPO, REWARD, MERGE = "01-sft", "02-dpo", "03-reward", "04-merge"


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., tuple[Plan, Loaded]]:
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"text": "a row"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    (tmp_path / "chain.toml").write_text(RECIPE)

    def act(*settings: str) -> tuple[Plan, Loaded]:
        loaded = rules.load_and_check(tmp_path / "chain.toml", settings)
        return make_plan(loaded.recipe, tmp_path / "run"), loaded

    return act


@pytest.fixture
def run(plan: Callable[..., tuple[Plan, Loaded]]) -> RunDir:
    """A run whose stages are all finished."""
    made = prepare(*plan(), backends.on(None))
    for stage_dir in made.stage_dirs():
        stage_dir.result.write_text("{}")
    return made


@pytest.mark.parametrize(
    ("stage", "settings", "removed"),
    [
        ("sft", [], [SFT, DPO, REWARD, MERGE]),
        ("dpo", [], [DPO, MERGE]),  # the reward model starts from SFT, and stays
        ("dpo", ["stage.dpo.beta=0.2"], [DPO, MERGE]),
        ("reward", [], [REWARD]),
        ("03-reward", ["stage.merge.dtype=fp32"], [REWARD, MERGE]),
        ("merge", [], [MERGE]),
        ("sft", ["parallel.strategy=ddp", "parallel.procs_per_node=2"], [SFT, DPO, REWARD, MERGE]),
    ],
)
def test_what_depends_on_the_stage_goes(
    stage: str, settings: list[str], removed: list[str], run: RunDir, plan: Callable[..., tuple[Plan, Loaded]]
) -> None:
    after, loaded = plan(*settings)
    assert obsolete_stages(run, after, stage) == removed
    rerun_from(run, after, loaded, backends.on(None), removed)
    assert [stage_dir.name for stage_dir in run.stage_dirs()] == [SFT, DPO, REWARD, MERGE]
    assert [stage_dir.name for stage_dir in run.stage_dirs() if not stage_dir.result.exists()] == removed
    assert runs.read_plan(run) == after


def test_a_stage_ahead_must_be_what_it_was(run: RunDir, plan: Callable[..., tuple[Plan, Loaded]]) -> None:
    after, _ = plan("stage.sft.learning_rate=1e-3")
    with pytest.raises(UserError, match="01-sft, which comes before 02-dpo, would be trained otherwise now") as caught:
        obsolete_stages(run, after, "dpo")
    assert caught.value.remedy == "begin with it: --from 01-sft"


def test_data_that_was_edited_is_noticed_where_a_stage_on_it_would_be_kept(
    run: RunDir, plan: Callable[..., tuple[Plan, Loaded]], tmp_path: Path
) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "another"}\n')
    after, loaded = plan()
    # The reward model does not come from DPO, but it was trained on other pairs.
    assert obsolete_stages(run, after, "dpo") == [DPO, REWARD, MERGE]
    with pytest.raises(UserError, match=r"02-dpo would be kept, and .*pairs\.jsonl has changed since") as caught:
        obsolete_stages(run, after, "merge")
    assert caught.value.remedy == "put back what was there, or begin with it: --from 02-dpo"
    rerun_from(run, after, loaded, backends.on(None), [DPO, REWARD, MERGE])
    assert obsolete_stages(run, after, "reward") == [REWARD, MERGE]


def test_how_the_work_is_shared_out_makes_no_other_stage(run: RunDir, plan: Callable[..., tuple[Plan, Loaded]]) -> None:
    after, _ = plan("parallel.strategy=zero2", "parallel.procs_per_node=4", "stage.sft.save_every=5")
    assert obsolete_stages(run, after, "dpo") == [DPO, MERGE]


def test_the_stage_must_be_there(run: RunDir, plan: Callable[..., tuple[Plan, Loaded]]) -> None:
    with pytest.raises(UserError, match="chain has no stage 'orpo'") as caught:
        obsolete_stages(run, plan()[0], "orpo")
    assert caught.value.remedy == f"name one of {SFT}, {DPO}, {REWARD}, {MERGE}"


def test_a_recipe_that_grows_keeps_what_is_done(
    run: RunDir, plan: Callable[..., tuple[Plan, Loaded]], tmp_path: Path
) -> None:
    (tmp_path / "chain.toml").write_text(RECIPE + '[[stage]]\nkind = "merge"\nstart = "sft"\n')
    after, loaded = plan()
    with pytest.raises(UserError) as caught:
        prepare(after, loaded, backends.on(None))
    assert caught.value.remedy.endswith(f"keep {SFT}, {DPO}, {REWARD}, {MERGE} and rerun with --from 05-merge")
    assert obsolete_stages(run, after, "05-merge") == []
    rerun_from(run, after, loaded, backends.on(None), [])
    assert [stage_dir.name for stage_dir in run.stage_dirs() if not stage_dir.result.exists()] == ["05-merge"]
