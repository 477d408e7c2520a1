"""Variants of recipes, how they are run, their spread and paired differences, and the table."""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.launcher.conftest import Call
from tests.launcher.scripted_runs import Text, make_plan

from ftlaunch.backend import backends, supervisor
from ftlaunch.backend.protocol import Say
from ftlaunch.compare import runner, table
from ftlaunch.compare.measures import Measures
from ftlaunch.compare.statistics import paired, spread, t_quantile
from ftlaunch.compare.variants import Trial, Variant, budget, trials, variants
from ftlaunch.errors import BAD_INPUT, DONE, STAGE_FAILED, STOPPED, RecipeError, UserError
from ftlaunch.run.layout import RunDir

RECIPE = """\
name = "{name}"
model.path = "owner/model"
adapter.kind = "lora"
[data.qa]
path = "owner/rows"
prompt = "{{question}}"
completion = "{{answer}}"
[[stage]]
kind = "sft"
data = "qa"
steps = 10
{more}"""
SWEEP = """
[sweep.variants]
lora = []
noisy = ["noise.kind=gaussian", "noise.std=0.5"]
[sweep.grid]
"adapter.rank" = [2, 4]
"""
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def call(name: str, more: str = "") -> Path:
        path = tmp_path / f"{name}.toml"
        path.write_text(RECIPE.format(name=name, more=more))
        return path

    return call


def test_a_sweep_is_every_variant_with_every_combination(write: Write, tmp_path: Path) -> None:
    found = variants([write("a", SWEEP)], ["stage.0.learning_rate=1e-3"])
    assert [variant.label for variant in found] == ["lora,rank=2", "lora,rank=4", "noisy,rank=2", "noisy,rank=4"]
    planned = trials(found, 2, tmp_path / "out")
    assert [trial.seed for trial in planned] == [42] * 4 + [43] * 4
    last = planned[-1].plan
    spec = last.stages[0].spec
    assert last.run_dir == f"{tmp_path}/out/noisy,rank=4/seed-43"
    assert (spec.seed, spec.learning_rate, spec.noise.__struct_config__.tag) == (43, 1e-3, "gaussian")
    assert spec.adapter.rank == 4  # type: ignore[union-attr]
    assert last.recipe.sweep is None


def test_paths_of_a_sweep_count_from_its_recipe_and_those_of_set_from_here(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("a/rows.csv", "b/rows.csv", "here/c.csv"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("question,answer\nx,y\n")
    monkeypatch.chdir(tmp_path / "here")
    recipe = write("a", '[sweep.grid]\n"data.qa.path" = ["a/rows.csv", "b/rows.csv"]\n')
    found = trials(variants([recipe], ["data.qa.eval=c.csv"]), 1, tmp_path / "out")
    tables = [trial.plan.recipe.data["qa"] for trial in found]
    paths = [[table.path, table.eval] for table in tables]
    assert paths == [[f"{tmp_path}/{name}/rows.csv", f"{tmp_path}/here/c.csv"] for name in ("a", "b")]


def test_the_plan_of_a_sweep_shows_each_variant_by_what_differs(write: Write, call: Call) -> None:
    code, said, _ = call("plan", write("a", SWEEP))
    assert code == DONE
    first, *others = said.rstrip().split("\n\n")[1:]
    assert first.startswith("lora,rank=2: adapter.rank=2\n")
    assert "LoRA of rank 2" in first
    assert [part.splitlines()[0] for part in others] == [
        "lora,rank=4: adapter.rank=4",
        "noisy,rank=2: noise.kind=gaussian, noise.std=0.5, adapter.rank=2",
        "noisy,rank=4: noise.kind=gaussian, noise.std=0.5, adapter.rank=4",
    ]
    assert others[0].splitlines()[1:] == ["    01-sft  adapter  LoRA of rank 4 on all-linear, scale alpha / rank = 4"]
    assert call("plan", write("a", SWEEP), "--run-dir", "x")[0] == BAD_INPUT
    plans = json.loads(call("plan", "--json", write("a", SWEEP))[1])
    assert [plan["recipe"]["adapter"]["rank"] for plan in plans.values()] == [2, 4, 2, 4]


@pytest.mark.parametrize("option", [("--site", "time=1"), ("--at-once", "2")])
def test_options_of_a_cluster_are_refused_without_one(option: tuple[str, str], write: Write, call: Call) -> None:
    code, _, said = call("compare", write("a", SWEEP), *option)
    assert code == BAD_INPUT
    assert option[0] in said


def test_recipes_are_variants_by_name(write: Write) -> None:
    found = variants([write("plain"), write("swept", SWEEP)], [])
    assert [variant.folder for variant in found][:2] == ["plain", "swept-lora,rank=2"]
    assert [variant.label for variant in found][-1] == "swept/noisy,rank=4"


def test_keys_that_end_alike_are_told_whole(write: Write) -> None:
    more = (
        '[sweep.grid]\n"optimizer.eps" = [1e-8]\n"model.dtype" = ["bf16", "fp32"]\n"stage.0.model.dtype" = ["fp32"]\n'
    )
    more += '"stage.0.model.path" = ["owner/model"]\n'
    assert [variant.label for variant in variants([write("a", more)], [])] == [
        f"eps=1e-08,model.dtype={dtype},stage.0.model.dtype=fp32,path=owner/model" for dtype in ("bf16", "fp32")
    ]


def test_what_cannot_be_compared_is_refused(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to compare a with"):
        variants([write("a")], [])
    with pytest.raises(UserError, match="several variants are called a"):
        variants([write("a"), write("a")], [])
    with pytest.raises(RecipeError, match=r"adapter\.rnk"):
        trials(variants([write("a", '[sweep.variants]\nx = []\ny = ["adapter.rnk=2"]\n')], []), 1, tmp_path)
    longer = variants([write("a"), write("b")], [])
    longer[1] = type(longer[1])("b", longer[1].recipe, ("stage.0.batch_size=16",))
    with pytest.raises(UserError, match="b trains 160 rows of rows, and a 80 rows of rows"):
        trials(longer, 1, tmp_path)


def test_a_budget_is_rows_or_epochs(write: Write, tmp_path: Path) -> None:
    path = write("a", '[sweep.grid]\n"stage.0.batch_size" = [4, 8]\n')
    path.write_text(path.read_text().replace("steps = 10", "epochs = 2"))
    first, second = trials(variants([path], []), 1, tmp_path)
    assert budget(first.plan) == budget(second.plan) == "2 epochs of rows"


@pytest.mark.parametrize(("degrees", "printed"), [(1, 12.706), (2, 4.303), (31, 2.040), (60, 2.000), (500, 1.965)])
def test_student_s_t_is_that_of_printed_tables(degrees: int, printed: float) -> None:
    assert t_quantile(degrees) == pytest.approx(printed, abs=6e-4)


def test_paired_differences_are_those_worked_by_hand() -> None:
    told = paired([1.0, 2.5, 3.0, 2.0], [1.5, 2.0, 3.5, 3.0], "rows")  # -0.5, 0.5, -0.5, -1
    assert told.mean == pytest.approx(-0.375)
    assert told.half_width == pytest.approx(3.182 * math.sqrt(1.1875 / 3) / 2)
    assert (told.pairs, told.of) == (4, "rows")
    assert paired([1.0], [2.0], "seeds").half_width is None
    assert spread([1.0, 3.0]).std == pytest.approx(math.sqrt(2))


def measures(loss: float, seconds: float, row_losses: list[float]) -> Measures:
    return Measures(
        quality={"eval/loss": loss, "loss": 9.0},
        seconds_a_step=seconds,
        peak_memory_bytes=2e9,
        trained_parameters=1234567.0,
        artifact_bytes=4096.0,
        row_losses=row_losses,
    )


def test_the_table_sets_each_variant_against_the_first() -> None:
    plain = [measures(1.0, 2.0, [1.0, 1.2]), measures(1.2, 2.0, [1.1, 1.3])]
    fast = [measures(0.9, 1.0, [0.9, 1.1]), measures(1.0, 1.0, [0.9, 1.2])]
    rows = table.rows(["plain", "fast"], [["p0", "p1"], ["f0", "f1"]], [plain, fast])
    assert [row.acceleration for row in rows] == [0.0, 50.0]
    assert rows[0].difference is None
    assert rows[1].difference == paired([0.9, 1.1, 0.9, 1.2], [1.0, 1.2, 1.1, 1.3], "rows")
    head, lines = table.head_and_lines(rows)
    assert head[:3] == ["variant", "eval/loss", "Δ eval/loss [95 %, rows]"]
    assert lines[1] == [
        *("fast", "0.95 ± 0.071", "-0.1250 [-0.2046, -0.0454]", "1 ± 0", "+50.0 %", "2 GB", "1,234,567", "4.1 kB")
    ]


def test_without_rows_seeds_are_paired() -> None:
    plain = [measures(1.0, 2.0, []), measures(1.2, 2.0, [])]
    fast = [measures(0.9, 1.0, [1.0]), measures(1.0, 1.0, [1.0])]
    rows = table.rows(["plain", "fast"], [[], []], [plain, fast])
    assert rows[1].difference == paired([0.9, 1.0], [1.0, 1.2], "seeds")


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Trial]]:
    """Trials whose processes are scripted."""
    monkeypatch.setattr(supervisor, "POLL_SECONDS", 0.01)
    monkeypatch.setattr("ftlaunch.run.provenance.collect", lambda *_: {})

    def make(*acts: str, seed: int = 1) -> list[Trial]:
        return [
            Trial(
                Variant(act, tmp_path, ()),
                seed,
                make_plan(tmp_path / act, act, seed=seed),
                Text(tmp_path / "r.toml"),  # type: ignore[arg-type]
            )
            for act in acts
        ]

    return make


def test_a_trial_that_fails_does_not_stop_the_others_and_what_is_done_is_not_run_again(
    scripted: Callable[..., list[Trial]], tmp_path: Path
) -> None:
    said: list[str] = []
    for _ in range(2):
        assert conduct(scripted("fail", "train"), said.append) == STAGE_FAILED
    assert said == [
        "trial 1 of 2: fail, seed 1",
        "trial 2 of 2: train, seed 1",
        "trial 1 of 2: fail, seed 1",
        "trial 2 of 2: train, seed 1: finished",
    ]
    attempts = {act: len(RunDir(tmp_path / act).stage_dir("01-sft").all_attempts()) for act in ("fail", "train")}
    assert attempts == {"fail": 2, "train": 1}
    with pytest.raises(UserError, match="another recipe or other settings"):
        conduct(scripted("train", seed=2), said.append)


@pytest.mark.parametrize("act", ["take_long_to_stop", "finish_when_stopped"])
def test_a_stop_ends_the_comparison_also_where_it_comes_with_the_end_of_a_trial(
    act: str, scripted: Callable[..., list[Trial]], tmp_path: Path
) -> None:
    attempt = tmp_path / act / "01-sft/attempts/1"
    asking = threading.Thread(target=terminate_once_there_is, args=(attempt / "process.json",))
    asking.start()
    assert conduct(scripted(act, "train"), lambda _: None) == STOPPED
    asking.join()
    assert not RunDir(tmp_path / "train").stage_dir("01-sft").attempts.exists()


def conduct(trials: list[Trial], say: Say) -> int:
    return runner.conduct(trials, backends.on(None), None, say)


def terminate_once_there_is(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
