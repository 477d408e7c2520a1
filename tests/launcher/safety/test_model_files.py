"""Model folders that ask for more than being loaded, and recipes that name them."""

import json
from pathlib import Path

import pytest

from ftlaunch import rules
from ftlaunch.errors import RecipeError, UserError
from ftlaunch.safety.model_files import require_plain, require_weights_to_train, shard_names

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RECIPE = """\
name = "demo"
[model]
path = "{path}"
[adapter]
kind = "lora"
[data.qa]
path = "owner/rows"
prompt = "{{question}}"
completion = "{{answer}}"
[[stage]]
kind = "sft"
data = "qa"
"""

DEMANDS = {
    "auto_map": ("config.json", {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}),
    "tokenizer code": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
    "CVE-2026-4372": ("config.json", {"_attn_implementation_internal": "evil/kernel"}),
    "experts": ("config.json", {"_experts_implementation_internal": "evil/kernel"}),
    "in a part": ("config.json", {"text_config": {"parts": [{"_attn_implementation_internal": "evil/kernel"}]}}),
    "another config file": ("config.4.0.0.json", {"auto_map": {"AutoConfig": "evil.Config"}}),
    "CVE-2026-5241": ("config.json", {"keypoint_detector_config": {"trust_remote_code": True}}),
    "hub kernel": ("config.json", {"attn_implementation": "paged|evil/kernel:flash"}),
    "hub kernel of a part": ("config.json", {"_attn_implementation": {"text_config": "evil/kernel"}}),
    "tokenizer_kwargs": ("adapter_config.json", {"tokenizer_kwargs": {"trust_remote_code": True}}),
    "auto_mapping": ("adapter_config.json", {"auto_mapping": {"parent_library": "evil", "base_model_class": "Model"}}),
    "megatron": ("adapter_config.json", {"megatron_config": {"a": 1}, "megatron_core": "evil"}),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama", "_attn_implementation": "sdpa"}')
    (model / "tokenizer.json").write_text('{"model": {"vocab": {"auto_map": 1, "x_internal": 2}}}')
    (model / "model.safetensors").touch()
    return model


@pytest.fixture
def recipe(folder: Path) -> Path:
    path = folder.parent / "recipe.toml"
    path.write_text(RECIPE.format(path=folder))
    return path


def problems(recipe: Path, *overrides: str) -> list[tuple[str, str]]:
    with pytest.raises(RecipeError) as refused:
        rules.load_and_check(recipe, overrides)
    return [(problem.key, str(problem)) for problem in refused.value.problems]


def test_a_plain_folder_is_taken_whatever_lies_beside_its_weights(folder: Path, recipe: Path):
    (folder / "optimizer.pt").touch()
    (folder / "pytorch_model.bin").touch()
    (folder / "modeling_evil.py").touch()  # nothing names it
    (folder / "adapter_notes.json").write_text('{"auto_mapping": {"parent_library": "transformers.models.llama"}}')
    (folder / "odd.json").write_text("not JSON, so nobody can read it")
    require_plain(folder)
    rules.load_and_check(recipe)


@pytest.mark.parametrize("name", DEMANDS)
def test_a_wish_for_code_is_refused_by_its_key_before_anything_is_written(name: str, folder: Path, recipe: Path):
    file, content = DEMANDS[name]
    (folder / file).write_text(json.dumps({"model_type": "llama", "weight": float("nan"), **content}))
    with pytest.raises(UserError, match=rf"{file} has the key"):
        require_plain(folder, allow_pickle=True)
    (key, text), *others = problems(recipe)
    assert (key, others) == ("model.path", [])
    assert file in text


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt", "model.pkl"])
def test_pickled_weights_are_refused_where_there_are_no_others(weights: str, folder: Path, recipe: Path):
    (folder / "model.safetensors").rename(folder / weights)
    assert weights in problems(recipe)[0][1]
    require_plain(folder, allow_pickle=True)


def test_an_adapters_pickle_is_not_excused_by_a_models_safetensors(folder: Path):
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.bin").touch()
    with pytest.raises(UserError, match=r"adapter_model\.bin"):
        require_plain(folder)
    (folder / "adapter_model.safetensors").touch()
    require_plain(folder)


@pytest.mark.parametrize("name", ["../../other/model.safetensors", "/etc/passwd", "shard-1.bin"])
def test_an_index_names_safetensors_beside_it_only(name: str, folder: Path):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": name}}))
    with pytest.raises(UserError, match="no safetensors file of its folder"):
        require_plain(folder)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    require_plain(folder)
    assert shard_names(folder) == ["one.safetensors"]


def test_pickles_may_be_allowed_for_a_full_commit_of_a_hub_id_alone(folder: Path, recipe: Path):
    allowed = ("model.path=owner/model", "model.allow_pickle=true")
    rules.load_and_check(recipe, [*allowed, f"model.revision={COMMIT}"])
    for revision in ("main", COMMIT[:12], "v1.0"):
        assert problems(recipe, *allowed, f"model.revision={revision}")[0][0] == "model.allow_pickle"
    assert problems(recipe, *allowed)[0][0] == "model.allow_pickle"
    assert problems(recipe, "model.allow_pickle=true")[0][0] == "model.allow_pickle"
    merged = recipe.with_name("merged.toml")
    merged.write_text(recipe.read_text() + '[[stage]]\nkind = "merge"\n')
    assert problems(merged, *allowed, f"model.revision={COMMIT}")[0][0] == "stage[1]"
    assert folder.exists()


def test_models_and_templates_that_others_may_write_are_refused_and_data_is_not(folder: Path, recipe: Path):
    template, rows = folder.parent / "chat.jinja", folder.parent / "rows.jsonl"
    template.write_text("{{ messages[0]['content'] }}")
    rows.write_text('{"question": "a", "answer": "b"}\n')
    for path in (template, rows, folder):
        path.chmod(path.stat().st_mode | 0o002)
    found = problems(recipe, f"data.qa.template={template}", f"data.qa.path={rows}")
    assert [key for key, _ in found] == ["data.qa.template", "model.path"]
    assert all("chmod -R go-w" in text for _, text in found)


def test_a_secret_in_a_recipe_is_refused_wherever_it_stands(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    token = "hf_" + "Abcd1234" * 4
    monkeypatch.setenv("LAB_PASSWORD", "correct-horse-battery")
    recipe.write_text(recipe.read_text() + f"# {token}\n[optimizer]\n")
    (key, text), *others = problems(recipe)
    assert (key, others) == ("", [])
    assert f"{recipe}:13: holds what looks like a secret" in text
    recipe.write_text(recipe.read_text().replace(token, "nothing"))
    rules.load_and_check(recipe)
    for setting in (f"model.revision={token}", "data.qa.prompt={question} correct-horse-battery"):
        found = problems(recipe, "model.path=owner/model", setting)
        assert [key for key, _ in found] == [setting.partition("=")[0]]


@pytest.mark.parametrize(("method", "is_refused"), [("gptq", True), ("awq", True), ("fp8", True), ("mxfp4", False)])
def test_weights_in_few_bits_are_no_base(method: str, is_refused: bool, tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if not is_refused:
        require_weights_to_train(tmp_path)
        return
    with pytest.raises(UserError, match=rf"holds its weights in few bits \({method}\)"):
        require_weights_to_train(tmp_path)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "bart", "is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"text_config": {"use_bidirectional_attention": "all"}}, "use_bidirectional_attention"),
        ({"text_config": {"use_bidirectional_attention": "vision"}, "is_encoder_decoder": False}, None),
        ({"model_type": "roberta"}, "it is an encoder"),
        ({"model_type": "roberta", "is_decoder": True}, None),
    ],
)
def test_a_config_tells_of_a_model_that_reads_both_ways(config: dict, why: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if why is None:
        require_weights_to_train(tmp_path)
        return
    with pytest.raises(UserError, match=f"config.json says {why}"):
        require_weights_to_train(tmp_path)
