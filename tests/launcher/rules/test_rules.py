"""Rules between keys: what they let through, a stage's own tables, and the check of data rows."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from ftlaunch import rules
from ftlaunch.errors import RecipeError
from ftlaunch.load import load_recipe
from ftlaunch.plan import resolve
from ftlaunch.plan.plan import make_plan
from ftlaunch.recipe.adapter import Lora
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.stages import Merge, Parallel, Ppo, Sft
from ftlaunch.rows import Findings
from ftlaunch.rules import find_problems, load_and_check

SOUND = """\
name = "demo"
model.path = "owner/model"
adapter.kind = "lora"
[data.qa]
path = "owner/rows"
prompt = "{question}"
completion = "{answer}"
[[stage]]
kind = "sft"
data = "qa"
[[stage]]
kind = "merge"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(SOUND)
    return path


def keys(recipe: Path, *overrides: str) -> list[str]:
    return [problem.key for problem in find_problems(load_recipe(recipe, overrides))]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["parallel.strategy=ddp"],
        ["parallel.strategy=zero2"],
        ["parallel.strategy=zero3", "parallel.offload=cpu", "parallel.nodes=2", "parallel.procs_per_node=4"],
        ["model.quantization=nf4", "parallel.device=cpu"],
        ["model.quantization=fp4"],
        ["model.quantization.kind=qat", "model.quantization.bits=3", "parallel.strategy=zero2"],
        ["model.quantization.kind=bitlinear", "model.quantization.rms_norm=true", "parallel.strategy=ddp"],
        ["parallel.device=cpu", "stage.0.label_smoothing=0.1"],
        ["optimizer.name=paged_adamw_8bit", "parallel.strategy=ddp"],
        ["optimizer.name=adamw_8bit", "parallel.device=cpu"],
        ["parallel.strategy=ddp", "parallel.procs_per_node=2", "stage.0.micro_batch_size=2"],
        ["data.qa.streaming=true", "stage.0.steps=9", "data.qa.test=4", "stage.0.label_smoothing=0.1"],
        ["data.qa.test=0.5", "stage.0.evaluate_every=2"],
        ["data.qa.test=4", "stage.0.evaluate_every=2", 'stage.0.eval_metrics=["rouge"]', "stage.0.best_by=rougeL"],
        ["data.qa.test=4", "stage.0.evaluate_every=2", "stage.0.best_by=token_accuracy"],
        ["stage.0.warmup=9", "stage.0.steps=10"],
        ["stage.0.warmup=20", "stage.0.epochs=2"],
        ["stage.0.warmup=0.9", "stage.0.steps=1"],
        ["data.qa.format=prompt", "data.qa.system=Be kind to {name[0][first]}."],
        ["adapter.targets=.*(q|v)_proj"],
        ["data.qa.config=main", "data.qa.split=test", "data.qa.revision=v1", "data.qa.limit=5", "data.qa.test=4"],
    ],
)
def test_what_is_supported_passes(recipe: Path, overrides: list[str]) -> None:
    assert find_problems(load_recipe(recipe, overrides)) == []


@pytest.mark.parametrize("data_format", ["messages", "sharegpt"])
def test_conversations_may_train_every_assistant_turn(recipe: Path, data_format: str) -> None:
    text = SOUND.replace('prompt = "{question}"\ncompletion = "{answer}"', f'format = "{data_format}"')
    recipe.write_text(text)
    assert keys(recipe, "data.qa.train_on=assistant", "data.qa.messages_field=turns") == []


def test_experts_are_balanced_in_plain_passes_only(recipe: Path) -> None:
    assert keys(recipe, "stage.0.router_loss=0.1") == []
    assert keys(recipe, "stage.0.router_loss=0.1", "stage.0.r_drop=1") == ["stage[0].router_loss"]
    virtual = ["adapter.kind=prompt", "adapter.virtual_tokens=4", "stage.0.packing=false"]
    assert "stage[0].router_loss" in keys(recipe, "stage.0.router_loss=0.1", *virtual)


def test_a_revision_belongs_to_a_model_of_the_hub(recipe: Path, tmp_path: Path) -> None:
    assert keys(recipe, "model.revision=v1") == []
    assert keys(recipe, "model.revision=v1", f"model.path={tmp_path}") == ["model.revision"]


def test_a_stage_s_own_tables_count_and_are_blamed(recipe: Path) -> None:
    own = ["stage.0.parallel.device=cpu", "stage.0.model.path=owner/model", "stage.0.model.dtype=fp16"]
    assert keys(recipe, *own) == ["stage[0].model.dtype"]
    assert keys(recipe, "parallel.device=cpu", "stage.0.parallel.device=cuda", "model.dtype=fp16") == []
    assert keys(recipe, "model.quantization=nf4", "stage.0.adapter.kind=full") == ["model.quantization", "stage[1]"]


def test_what_two_stages_share_is_blamed_once(recipe: Path) -> None:
    second = '[[stage]]\nkind = "sft"\ndata = "qa"\n'
    recipe.write_text(SOUND.replace('[[stage]]\nkind = "merge"', second))
    assert keys(recipe, "parallel.offload=cpu") == ["parallel.offload"]


LORA, OTHER_LORA, FULL = 'kind = "lora"', 'kind = "lora", rank = 4', 'kind = "full"'


def starts(recipe: Path) -> list[tuple[str, str | None]]:
    """Folder and start of every step of the plan of a sound recipe."""
    loaded = load_recipe(recipe)
    assert find_problems(loaded) == []
    return [(planned.name, planned.spec.start) for planned in make_plan(loaded.recipe, Path("run")).stages]


@pytest.mark.parametrize(
    ("adapters", "names"),
    [
        ((LORA, LORA), ["sft", "sft"]),
        ((FULL, LORA), ["sft", "sft"]),  # a fresh adapter on the model that full fine-tuning left
        ((FULL, FULL), ["sft", "sft"]),
        ((FULL, LORA, LORA), ["sft", "sft", "sft"]),
        ((LORA, OTHER_LORA), ["sft", "merge", "sft"]),
        ((LORA, FULL), ["sft", "merge", "sft"]),
        ((FULL, LORA, OTHER_LORA), ["sft", "sft", "merge", "sft"]),
        (("", OTHER_LORA), ["sft", "merge", "sft"]),
        ((OTHER_LORA, ""), ["sft", "merge", "sft"]),  # what differs is the recipe's own table
        ((OTHER_LORA, "", OTHER_LORA), ["sft", "merge", "sft", "merge", "sft"]),
    ],
)
def test_another_adapter_begins_on_a_merge(recipe: Path, adapters: tuple[str, ...], names: list[str]) -> None:
    stages = ['[[stage]]\nkind = "sft"\ndata = "qa"\n' + f"adapter = {{{own}}}\n" * bool(own) for own in adapters]
    recipe.write_text(SOUND[: SOUND.index("[[stage]]")] + "".join(stages))
    found = starts(recipe)
    assert [name.partition("-")[2] for name, _ in found] == names
    for (name, _), (after, start) in pairwise(found):
        merged = name.endswith("merge") and not after.endswith("merge")
        assert start == f"{name}/{'model' if merged else 'artifact'}"


def stage(kind: str, *lines: str) -> str:
    return "".join(f"{line}\n" for line in ("[[stage]]", f'kind = "{kind}"', *lines))


@pytest.fixture
def chain(recipe: Path) -> Callable[..., Path]:
    """The sound recipe with other stages."""

    def write(*stages: str) -> Path:
        recipe.write_text(SOUND[: SOUND.index("[[stage]]")] + "".join(stages))
        return recipe

    return write


SFT = 'data = "qa"'


def test_a_stage_may_name_where_it_starts(chain: Callable[..., Path]) -> None:
    path = chain(
        stage("sft", SFT), stage("sft", SFT, "start = 0"), stage("sft", SFT, "start = 0"), stage("merge", "start = 1")
    )
    assert [start for _, start in starts(path)] == [None, *["01-sft/artifact"] * 2, "02-sft/artifact"]
    path = chain(stage("sft", SFT), stage("sft", SFT, 'start = "base"'), stage("merge", "start = 0"))
    assert [start for _, start in starts(path)] == [None, None, "01-sft/artifact"]


def test_a_merge_that_is_there_is_not_made_again(chain: Callable[..., Path]) -> None:
    own = f"adapter = {{{OTHER_LORA}}}"
    path = chain(stage("sft", SFT), stage("merge"), stage("sft", SFT, own), stage("sft", SFT, own, "start = 0"))
    assert [start for _, start in starts(path)] == [None, "01-sft/artifact", "02-merge/model", "02-merge/model"]


@pytest.mark.parametrize("start", ['"sft"', "2", "7", '"dpo"', '"01-sft"'])
def test_a_start_is_one_training_stage_earlier(chain: Callable[..., Path], start: str) -> None:
    path = chain(stage("sft", SFT), stage("sft", SFT), stage("sft", SFT, f"start = {start}"))
    [problem] = find_problems(load_recipe(path))
    assert problem.key == "stage[2].start"
    assert problem.remedy == "name one by its place: 0 (sft) or 1 (sft)"


def test_a_merge_cannot_start_from_the_base(chain: Callable[..., Path]) -> None:
    path = chain(stage("sft", SFT), stage("merge", 'start = "base"'))
    assert keys(path) == ["stage[1].start"]


def test_two_rules_of_the_optimizer_are_both_told(recipe: Path) -> None:
    found = keys(recipe, "optimizer.name=paged_adamw_8bit", "parallel.device=cpu", "parallel.strategy=zero1")
    assert found == ["optimizer.name", "optimizer.name"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [("[0,30]", "names layer 30, and the model has 30"), ("top:31", "more layers than the model's 30"), ("[29]", "")],
)
def test_layers_are_looked_up_in_the_model(layers: str, message: str, recipe: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"num_hidden_layers": 30}')
    (model / "model.safetensors").touch()
    found = find_problems(load_recipe(recipe, [f"model.path={model}", f"adapter.layers={layers}"]))
    assert [problem.key for problem in found] == (["adapter.layers"] if message else [])
    assert all(message in problem.message for problem in found)


class TestResolve:
    def test_a_stage_s_tables_win_whole(self, recipe: Path) -> None:
        overrides = ["parallel.nodes=2", "parallel.strategy=ddp", "stage.0.parallel.procs_per_node=3"]
        loaded = load_recipe(recipe, [*overrides, "stage.0.parallel.strategy=ddp"])
        resolved = resolve.resolve(loaded.recipe)[0].tables
        assert resolved.parallel == Parallel(strategy="ddp", procs_per_node=3)
        assert resolved.parallel.world_size == 3
        assert resolved.adapter == Lora()

    def test_a_merge_has_the_tables_of_the_training_before_it_and_one_process(self, recipe: Path) -> None:
        overrides = ["stage.0.adapter.rank=3", "stage.0.adapter.kind=lora", "adapter.kind=full"]
        parallel = ["parallel.strategy=zero3", "parallel.nodes=2", "parallel.device=cpu"]
        loaded = load_recipe(recipe, overrides + parallel)
        resolved = resolve.resolve(loaded.recipe)[1].tables
        assert resolved.adapter == Lora(rank=3)
        assert resolved.parallel == Parallel(device="cpu")
        assert resolved.parallel.world_size == 1

    def test_equal_stages_are_told_apart(self, recipe: Path) -> None:
        loaded = load_recipe(recipe)
        first, last = Sft(data="qa"), Sft(data="qa")
        stages = [first, Merge(), last, Merge()]
        changed = type(loaded.recipe)(name="x", model=loaded.recipe.model, stage=stages)
        before = [one.before and one.before.stage for one in resolve.resolve(changed)]
        assert before[0] is None
        assert before[2] is first
        assert before[3] is last


class TestCheck:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[Data]:
        """The data tables whose rows are looked into; the look finds one mistake in files called bad.jsonl."""
        asked: list[Data] = []

        def check_rows(data: Data, *, only_prompts: bool) -> Findings:
            assert not only_prompts
            asked.append(data)
            bad = data.path.endswith("bad.jsonl")
            return Findings([(f"{data.path}:3", "no field {x}", "add it")] if bad else [])

        monkeypatch.setattr(rules, "check_rows", check_rows)
        return asked

    def test_a_sound_recipe_is_returned(self, recipe: Path, asked: list[Data]) -> None:
        assert load_and_check(recipe, ["seed=3"]).recipe.seed == 3
        assert asked == []  # a hub data set is the trainer's

    def test_mistakes_in_rows_are_problems_with_the_data_s_own_line(self, recipe: Path, asked: list[Data]) -> None:
        rows = recipe.with_name("bad.jsonl")
        rows.touch()
        with pytest.raises(RecipeError) as caught:
            load_and_check(recipe, [f"data.qa.path={rows}"])
        [problem] = caught.value.problems
        assert str(problem) == f"{rows}:3: data.qa: no field {{x}}\n  → add it"
        assert [data.path for data in asked] == [str(rows)]

    @pytest.mark.parametrize(("override", "told"), [("seed=x", []), ("parallel.offload=cpu", ["no field {x}"])])
    def test_rows_are_told_of_together_with_rules_and_left_alone_where_keys_cannot_be_read(
        self, recipe: Path, asked: list[Data], override: str, told: list[str]
    ) -> None:
        rows = recipe.with_name("bad.jsonl")
        rows.touch()
        with pytest.raises(RecipeError) as caught:
            load_and_check(recipe, [f"data.qa.path={rows}", override])
        first, *others = caught.value.problems
        assert first.where == f"--set {override}"
        assert [problem.message for problem in others] == told
        assert len(asked) == len(told)


PPO = """\
[[stage]]
kind = "reward"
data = "pairs"
[[stage]]
kind = "ppo"
data = "prompts"
[[stage]]
kind = "merge"
[data.pairs]
path = "owner/pairs"
format = "preference"
[data.prompts]
path = "owner/prompts"
prompt = "{question}"
"""


def test_ppo_goes_on_with_the_policy_and_asks_the_reward_stage(recipe: Path):
    recipe.write_text(SOUND.replace('[[stage]]\nkind = "merge"\n', PPO))
    loaded = load_recipe(recipe)
    assert find_problems(loaded) == []
    _, reward, ppo, merge = make_plan(loaded.recipe, Path("run")).stages
    assert (reward.spec.start, reward.spec.reward) == ("01-sft/artifact", None)
    assert (ppo.spec.start, ppo.spec.reward) == ("01-sft/artifact", "02-reward/artifact")
    assert merge.spec.start == "03-ppo/artifact"
    assert ppo.notes["reward"] == "model 02-reward/artifact"
    assert ppo.notes["reference"] == "01-sft/artifact as it is at the start; no second model is loaded"


def test_a_reward_stage_with_another_adapter_is_refused_before_it_is_trained(recipe: Path):
    other = 'kind = "reward"\ndata = "pairs"\n[stage.adapter]\nkind = "lora"\nrank = 2\n'
    recipe.write_text(
        SOUND.replace('[[stage]]\nkind = "merge"\n', PPO.replace('kind = "reward"\ndata = "pairs"\n', other))
    )
    assert keys(recipe) == ["stage[2].adapter"]
    assert keys(recipe, 'stage.1.start="base"') == []


def test_prompts_without_completions_are_for_ppo_alone(recipe: Path):
    recipe.write_text(SOUND.replace('completion = "{answer}"\n', ""))
    assert keys(recipe) == ["data.qa.completion"]
    ppo = recipe.read_text().replace('kind = "sft"', 'kind = "ppo"\nreward_function = "gsm8k"')
    recipe.write_text(ppo)
    assert keys(recipe) == []


def test_a_reward_function_is_looked_for_and_not_imported(recipe: Path):
    file = recipe.parent / "r.py"
    file.write_text("raise SystemExit\nfrom math import sqrt\nbest = max\nasync def f(): ...\ndef g(): ...")
    recipe.write_text(SOUND.replace('kind = "sft"', 'kind = "ppo"\nreward_function = "r.py:g"'))
    stage = load_recipe(recipe).recipe.stage[0]
    assert isinstance(stage, Ppo)
    assert stage.reward_function == f"{recipe.parent.resolve()}/r.py:g"
    for name, problems in {"g": 0, "sqrt": 0, "best": 0, "f": 1, "h": 1}.items():
        assert len(keys(recipe, f"stage.ppo.reward_function={file}:{name}")) == problems
    file.write_text("def g(:")
    assert keys(recipe) == ["stage[0].reward_function"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "good"}}', None),
        ('{"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}', "gives 2 numbers"),
        ('{"architectures": ["LlamaForCausalLM"]}', "LlamaForCausalLM, which gives no scores"),
        ("", "holds no model"),
    ],
)
def test_a_reward_model_on_this_machine_gives_one_score(recipe: Path, config: str, said: str | None):
    (recipe.parent / "judge").mkdir()
    if config:
        (recipe.parent / "judge" / "config.json").write_text(config)
    recipe.write_text(SOUND.replace('kind = "sft"', 'kind = "ppo"\nreward_model = "./judge"'))
    problems = find_problems(load_recipe(recipe))
    assert [said is not None and said in problem.message for problem in problems] == ([] if said is None else [True])


@pytest.mark.parametrize("place", ["nowhere/rows.jsonl", f"./{'a' * 300}.jsonl"])
def test_a_missing_path_hides_no_other_problem(place: str, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        f'name = "r"\nmodel.path = "owner/model"\ndata.d = {{path = "{place}", format = "text"}}\n'
        '[[stage]]\nkind = "sft"\ndata = "d"\nbatch_size = 7\nmicro_batch_size = 2\n'
    )
    with pytest.raises(RecipeError) as caught:
        load_and_check(path)
    assert [problem.key for problem in caught.value.problems] == ["data.d.path", "stage[0].micro_batch_size"]


def test_a_misspelt_column_is_told_together_with_a_path_that_is_missing(recipe: Path):
    (recipe.parent / "there.jsonl").write_text('{"question": "Why?", "reply": "So."}\n')
    more = '[data.gone]\npath = "./gone.jsonl"\nprompt = "{question}"\ncompletion = "{answer}"\n'
    recipe.write_text(SOUND.replace("owner/rows", "./there.jsonl").replace("[[stage]]", f"{more}[[stage]]", 1))
    with pytest.raises(RecipeError) as caught:
        load_and_check(recipe, ['stage.0.data=["qa", "gone"]'])
    assert "field answer is missing" in str(caught.value)
    assert "gone.jsonl" in str(caught.value)


def test_a_plan_says_what_a_model_s_template_does_not_get(recipe: Path):
    more = '[data.other]\npath = "owner/others"\nformat = "messages"\n'
    more += 'template_arguments = {thinking = true, tone = "dry"}\n'
    asked = 'template_arguments = {thinking = false, tone = "dry"}\n'
    recipe.write_text(SOUND.replace("[[stage]]", f"{asked}{more}[[stage]]", 1))

    def note(*overrides: str) -> str | None:
        loaded = load_recipe(recipe, ['stage.0.data=["qa", "other"]', *overrides])
        return make_plan(loaded.recipe, Path("run")).stages[0].notes.get("template")

    assert note() == "the model's has no default for thinking, in which the data sets differ"
    assert note("data.qa.template_arguments.thinking=true") is None
    told = note("data.other.template=chatml", "data.qa.template_arguments.thinking=true")
    assert told == "the data sets have different ones, of which the model keeps that of qa"


def test_texts_that_no_stage_trains_on_are_told_with_what_is_wrong_with_them(recipe: Path):
    (recipe.parent / "texts.jsonl").write_text('{"text": "So."}\n')
    more = '[data.texts]\npath = "./texts.jsonl"\n'
    recipe.write_text(SOUND.replace("[[stage]]", f"{more}[[stage]]", 1))
    with pytest.raises(RecipeError, match=r"texts"):
        load_and_check(recipe)
    recipe.write_text(recipe.read_text() + '[[stage]]\nkind = "ppo"\ndata = "texts"\n')
    with pytest.raises(RecipeError, match="text"):
        load_and_check(recipe)
