"""What a stage finds out of a model that nobody has told it of, before it takes a step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.benchmarks.probe import by_arithmetic
from tests.conftest import _byte_tokenizer
from tests.faults.rank_faults import Fault
from tests.faults.ranks import Ranks, said, with_parallel, write_run
from tests.trainer.conftest import RECIPE
from tests.trainer.in_process import make_data, make_step, train
from tests.trainer.training import toy_families
from tests.zoo.families import build
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: F401 modules of families that use it have it

from ftlaunch.backend.status import measured
from ftlaunch.errors import UserError
from ftlaunch.load import load_recipe
from ftlaunch.recipe.adapter import Full
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.stages import Dpo
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import StageDir
from fttrain.training import probe

ARCHITECTURE = Path(__file__).parents[3] / "src" / "ARCHITECTURE.md"
ROWS = [("what is red", "a lamp and a kettle"), ("say", "no"), ("who was it that came", "the cook with a hat")]


class MixerConfig(LlamaConfig):
    model_type = "toy_mixer"


class HeadConfig(LlamaConfig):
    model_type = "toy_head"


class ScaledConfig(LlamaConfig):
    model_type = "toy_scaled"


class EncoderConfig(BertConfig):
    """Of an encoder that `validate` does not know by its name."""

    model_type = "toy_encoder"


class Blur(nn.Module):
    """A mixer that no library has: each token gets a share of the one before it, whatever row that is of."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        before_BTD = nn.functional.pad(hidden_BTD, (0, 0, 1, 0))[:, :-1]
        return self.inner(hidden_BTD + 0.5 * before_BTD)


class MixerForCausalLM(LlamaForCausalLM):
    config_class = MixerConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[0].mlp = Blur(self.model.layers[0].mlp)


class HeadForCausalLM(LlamaForCausalLM):
    """Its logits depend on more than hidden states."""

    config_class = HeadConfig

    def forward(self, input_ids: torch.Tensor, **asked: Any) -> Any:
        forward: Any = super().forward
        said = forward(input_ids=input_ids, **asked)
        said.logits = said.logits + nn.functional.one_hot(input_ids, said.logits.shape[-1])
        return said


class ScaledForCausalLM(LlamaForCausalLM):
    """Its logits are changed in a way that no key of its config tells."""

    config_class = ScaledConfig

    def forward(self, *given: Any, **asked: Any) -> Any:
        said: Any = super().forward(*given, **asked)
        said.logits = 2 * torch.tanh(said.logits * 0.7)
        return said


class EncoderForCausalLM(BertLMHeadModel):
    config_class = EncoderConfig


AutoConfig.register(EncoderConfig.model_type, EncoderConfig)
AutoModelForCausalLM.register(EncoderConfig, EncoderForCausalLM)
TOYS = {MixerConfig: MixerForCausalLM, HeadConfig: HeadForCausalLM, ScaledConfig: ScaledForCausalLM}
for known, family in TOYS.items():
    AutoConfig.register(known.model_type, known)
    AutoModelForCausalLM.register(known, family)


def saved(kind: type[LlamaConfig], folder: Path) -> Path:
    tokenizer = _byte_tokenizer()
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = TOYS[kind](kind(**shape, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=257))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained(model: Path, folder: Path, *, kind: str = "sft", **fields: Any) -> tuple[dict[str, Any], StageDir]:
    rows, pairs = folder / "rows.jsonl", folder / "pairs.jsonl"
    rows.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in ROWS))
    pairs.write_text("".join(json.dumps({"prompt": q, "chosen": a, "rejected": "rain"}) + "\n" for q, a in ROWS))
    fields = {"steps": 2, "batch_size": 3, **fields}
    if kind == "dpo":
        step = make_step(model, Data(path=str(pairs), format="preference"), kind=Dpo, **fields)
    else:
        step = make_step(model, make_data(rows), **fields)
    done = train(step, folder)
    return json.loads(done.result.read_text())["probe"], done


def losses(done: StageDir) -> list[float]:
    return [line["loss"] for line in read_jsonl(done.metrics) if "loss" in line]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_mixer_that_nobody_knows_is_found_out_and_its_rows_are_padded(kind: str, tmp_path: Path):
    model = saved(MixerConfig, tmp_path / "model")
    found, done = trained(model, tmp_path, kind=kind)
    assert (found["layout"], found["share_prompt"]) == ("padded", False)
    assert found["differences"]["packed"] > 10 * found["bound"]
    assert found["differences"]["padded"] < found["bound"]
    assert "toy_mixer: rows are padded instead of packed" in found["warnings"][0]
    assert measured(done, 1, "done", None).warnings == found["warnings"]
    (tmp_path / "plain").mkdir()
    asked = {"packing": False, **({"share_prompt": False} if kind == "dpo" else {})}
    assert losses(done) == losses(trained(model, tmp_path / "plain", kind=kind, **asked)[1])


def test_in_16_bits_too_it_has_a_verdict_on_each_trial_by_name(tiny_model: Path, tmp_path: Path):
    """What a mixer leaks from row to row is less than what 16 bits may round."""
    (tmp_path / "plain").mkdir()
    in_16_bits: dict[str, Any] = {"kind": "dpo", "model_fields": {"dtype": "bf16"}}
    found, _ = trained(tiny_model, tmp_path / "plain", **in_16_bits)
    shared, packed, padded = ([name, f"{name}, next to another row"] for name in ("shared", "packed", "padded"))
    assert list(found["differences"]) == ["head", "adapter", *shared, "training mode"]
    assert max(found["differences"].values()) < found["bound"] == probe.FLOORS["bf16"]
    found, _ = trained(saved(MixerConfig, tmp_path / "model"), tmp_path, **in_16_bits)
    assert list(found["differences"]) == ["head", "adapter", *shared, *packed, *padded, "training mode"]
    assert max(found["differences"][name] for name in ("shared", "packed")) < found["bound"]
    assert (found["layout"], found["share_prompt"]) == ("padded", False)


def test_two_ranks_that_share_the_weights_out_try_the_same_in_16_bits(
    tiny_model: Path, rows_file: Path, ranks: Ranks, tmp_path: Path
):
    (path := tmp_path / "tiny.toml").write_text(RECIPE.format(model=tiny_model, rows=rows_file, dropout=0.0))
    recipe = with_parallel(load_recipe(path, ["stage.sft.steps=1", "model.dtype=bf16"]).recipe, "zero3", 2)
    stage_dir = write_run(recipe, tmp_path / "run").stage_dir("01-sft")
    ranks.run(stage_dir)
    found = json.loads(stage_dir.result.read_text())["probe"]
    tried = ["packed", "packed, next to another row"]
    assert (found["layout"], list(found["differences"])) == ("packed", ["head", "adapter", *tried])
    assert max(found["differences"].values()) < found["bound"] == probe.FLOORS["bf16"]


@pytest.mark.parametrize(
    ("name", "fields", "layout"),
    [
        ("centred", {"kind": "dpo"}, "alone"),
        ("crowded", {"adapter": Full()}, "alone"),
        ("unmasked", {}, "padded"),
        ("placed", {"kind": "dpo"}, "padded"),
        ("tied", {"adapter": Full()}, "packed"),
    ],
)
def test_rows_of_families_that_nobody_knows_are_laid_as_their_parts_allow(
    name: str, fields: dict[str, Any], layout: str, tmp_path: Path
):
    found, _ = trained(toy_families.saved(name, tmp_path / "model"), tmp_path, **fields)
    assert found["layout"] == layout
    last = list(found["differences"].values())[-1]
    assert last < found["bound"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("biased", "toy_biased would be trained wrongly: even single rows give other results than its own forward"),
        ("normed", "toy_normed models cannot be trained: .*norm computes with statistics of the batch"),
    ],
)
def test_families_that_no_layout_is_right_for_are_refused(name: str, why: str, tmp_path: Path):
    with pytest.raises(UserError, match=why):
        trained(toy_families.saved(name, tmp_path / "model"), tmp_path)


def test_logits_that_hidden_states_do_not_give_end_the_stage_before_a_step(tmp_path: Path):
    model = saved(HeadConfig, tmp_path / "model")
    with pytest.raises(UserError, match="toy_head would be trained wrongly: logits of its last hidden"):
        trained(model, tmp_path)
    assert not (tmp_path / "01-sft/metrics.jsonl").exists()


def test_a_model_that_reads_both_ways_is_refused(tmp_path: Path):
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = AutoModelForCausalLM.from_config(EncoderConfig(**shape, vocab_size=len(_byte_tokenizer())))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "model")
    _byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(
        UserError, match="toy_encoder cannot be trained to go on with a text: tokens change what it says of"
    ):
        trained(tmp_path / "model", tmp_path)


def test_what_a_model_does_to_its_logits_is_done_in_training_too(tmp_path: Path):
    found, _ = trained(saved(ScaledConfig, tmp_path / "model"), tmp_path)
    assert found["layout"] == "packed"
    assert found["differences"]["head"] < 1e-5


def test_a_model_that_is_known_to_be_right_stays_packed_with_shared_prompts(tiny_model: Path, tmp_path: Path):
    found, _ = trained(tiny_model, tmp_path, kind="dpo")
    assert (found["layout"], found["share_prompt"], found["warnings"]) == ("packed", True, [])
    assert max(found["differences"].values()) < 1e-5


def test_the_probe_costs_what_the_architecture_page_says(tiny_model: Path, tmp_path: Path):
    found, _ = trained(tiny_model, tmp_path)
    passes, tokens = found["passes"], found["tokens"]
    small, large = (by_arithmetic(f"meta-llama/Llama-3.1-{size}", passes, tokens) for size in ("8B", "70B"))
    page = " ".join(ARCHITECTURE.read_text().split())
    assert f"{passes} passes over {tokens} tokens" in page
    assert f"{1e3 * small[0]:.1f} ms for Llama-3.1-8B and {1e3 * large[0]:.1f} ms for Llama-3.1-70B" in page
    assert f"Reading the weights {passes} times takes {1e3 * small[1]:.0f} ms and {1e3 * large[1]:.0f} ms" in page


def test_rows_long_enough_to_stretch_positions_are_computed_by_themselves(tmp_path: Path):
    model = build("phi3, long rope", tmp_path / "model")
    found, _ = trained(model, tmp_path)
    assert found["layout"] == "alone"
    assert found["warnings"][0].startswith("each row is computed by itself: the model turns the positions")


def test_all_ranks_pad_their_rows_where_one_of_them_cannot_pack(
    tiny_model: Path, rows_file: Path, ranks: Ranks, tmp_path: Path
):
    (path := tmp_path / "tiny.toml").write_text(RECIPE.format(model=tiny_model, rows=rows_file, dropout=0.0))
    recipe = with_parallel(load_recipe(path, ["stage.sft.steps=2"]).recipe, "ddp", 2)
    stage_dir = write_run(recipe, tmp_path / "run").stage_dir("01-sft")
    ranks.start(stage_dir, Fault("nan pass", step=0, rank=1, at="start"))
    assert ranks.wait() == [0, 0], said(stage_dir)
    assert json.loads(stage_dir.result.read_text())["probe"]["layout"] == "padded"


def test_a_model_whose_own_code_fails_on_a_row_is_refused_with_what_it_said(tmp_path: Path):
    model = build("xlstm", tmp_path / "model", mode="train")
    said = r"xlstm fails on a row of 40 random tokens \(ValueError: .* not divisible by chunk size 16"
    with pytest.raises(UserError, match=said):
        trained(model, tmp_path)


def test_the_probe_reads_no_token_that_the_head_leaves_out(tmp_path: Path):
    found, _ = trained(build("inkling", tmp_path / "model"), tmp_path)
    assert found["layout"] == "padded"


def test_positions_turned_by_the_length_of_a_row_are_no_sign_of_it_either(tmp_path: Path):
    turned = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = build("llama", tmp_path / "model", max_position_embeddings=32, rope_parameters=turned)
    assert trained(model, tmp_path)[0]["layout"] == "alone"


def test_keys_chosen_by_equal_ranks_are_no_sign_of_a_model_that_reads_both_ways(tmp_path: Path):
    model = build("deepseek_v32", tmp_path / "model", index_n_heads=1)
    assert trained(model, tmp_path)[0]["layout"] == "alone"


def test_rows_are_not_packed_for_a_model_that_sums_up_more_tokens_than_most_rows_have(tmp_path: Path):
    found, _ = trained(build("deepseek_v4", tmp_path / "model"), tmp_path)
    assert found["layout"] == "padded"
