"""Adapters of families whose weights are stacked, renamed, shared or next to a vision tower: put on, saved, merged."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.trainer.in_process import make_data, make_step, train
from tests.zoo.families import build
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    DeepseekV3Config,
    Gemma3Config,
    GPT2Config,
    Mamba2Config,
    PhimoeConfig,
    Qwen3MoeConfig,
)
from transformers.integrations import HfDeepSpeedConfig

from ftlaunch.errors import UserError
from ftlaunch.recipe.adapter import Full, Lora
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.model import Model
from ftlaunch.recipe.stages import Dpo, Merge, Reward, Sft
from fttrain import adapters
from fttrain.adapters import coverage, targets
from fttrain.distributed.stop_request import StoppedEarly
from fttrain.merging import dry_run
from fttrain.merging.merge import Source, merge
from fttrain.merging.weight_map import skeleton

SMALL: dict[str, Any] = {
    **{"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "bos_token_id": None},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 257},
}
MOE: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
GROUPS = {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS: dict[str, Any] = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**SMALL, **MOE, num_experts=4, head_dim=16),
    "phimoe": lambda: PhimoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": lambda: DeepseekV3Config(**(SMALL | MOE | LATENT | GROUPS)),
    "gemma3": lambda: Gemma3Config(
        text_config={**SMALL, "head_dim": 16},
        vision_config={**VISION, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    ),
    "gpt2": lambda: GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, bos_token_id=257, eos_token_id=257),
}
ALL = Lora(rank=4, alpha=8)
EXPERTS = Lora(rank=4, alpha=8, experts=True)
CASES = {
    "stacked experts": ("qwen3_moe", EXPERTS),
    "experts renamed on disk": ("phimoe", EXPERTS),
    "a router that is linear": ("phimoe", ALL),
    "shared experts": ("deepseek_v3", ALL),
    "shared and stacked experts": ("deepseek_v3", EXPERTS),
    "a vision tower": ("gemma3", ALL),
    "both ways round, and a tied head": ("gpt2", Lora(rank=4, alpha=8, targets=["c_attn", "c_proj", "lm_head"])),
}


def save(name: str, tiny_model: Path, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).save_pretrained(folder)
    # Configs from before transformers 5 leave the key out where it is the class's default.
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, folder)
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(40)[None] + 40, use_cache=False).logits


@pytest.mark.parametrize("case", CASES)
def test_what_is_trained_is_what_is_saved_and_merged(case: str, tiny_model: Path, tmp_path: Path) -> None:
    name, adapter = CASES[case]
    folder = save(name, tiny_model, tmp_path / "base")
    base = load(folder)
    before = logits(base)
    model = adapters.attach(base, adapter, None, in_fp32=True)
    dry_run.check(Model(path=str(folder), dtype="fp32"), model)
    trained = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    assert not any(word in key for key in trained for word in ("vision", "router", "gate."))
    if name == "deepseek_v3":
        assert any("shared_experts.up_proj" in key for key in trained)
        assert any("layers.0.mlp.gate_proj" in key for key in trained)
    assert any(".experts." in key for key in trained) == adapter.experts
    with torch.no_grad():
        for weight in trained.values():
            weight.normal_(std=0.05)
    expected = logits(model)
    assert (expected - before).abs().max() > 1e-3
    artifact = tmp_path / "artifact"
    adapters.save(model, adapter, {key: weight.detach().clone() for key, weight in trained.items()}, artifact)

    torch.testing.assert_close(logits(adapters.with_saved(load(folder), artifact)), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load(folder), artifact)), expected, atol=1e-5, rtol=0)
    merge(Source(Model(path=str(folder), dtype="fp32"), artifact), tmp_path / "merged", Merge())
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
    assert not any(info.values())
    if name == "gemma3":
        held, kept = (load_file(where / "model.safetensors") for where in (folder, tmp_path / "merged"))
        tower = [key for key in held if "vision" in key or "projector" in key]
        assert len(tower) > 10
        assert all(torch.equal(kept[key], held[key]) for key in tower)


def test_weights_that_no_optimizer_changes_are_in_what_is_saved(tmp_path: Path) -> None:
    """Buffers that are part of a model, such as the bias by which experts are chosen."""
    folder = build("glm4_moe", tmp_path / "base")
    model = load(folder)
    bias = torch.tensor([3.0, -3.0, 3.0, -3.0])
    model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(bias)
    model.save_pretrained(folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "who", "answer": "a cook"}\n' * 2)
    settings: dict[str, Any] = {"steps": 1, "batch_size": 2, "learning_rate": 1e-9}
    done = train(make_step(folder, make_data(rows), adapter=Full(), **settings), tmp_path)
    base, saved = (load_file(where / "model.safetensors") for where in (folder, done.artifact))
    assert saved.keys() == base.keys()
    assert torch.equal(saved["model.layers.1.mlp.gate.e_score_correction_bias"], bias)
    torch.testing.assert_close(logits(load(done.artifact)), logits(load(folder)), atol=1e-5, rtol=0)


def test_an_adapter_that_fits_no_file_is_refused_before_it_is_trained(tiny_model: Path, tmp_path: Path) -> None:
    folder, other = save("qwen3_moe", tiny_model, tmp_path / "base"), save("gpt2", tiny_model, tmp_path / "other")
    model = adapters.attach(load(folder), ALL, None, in_fp32=True)
    with pytest.raises(UserError, match=r"could not be merged .* the base does not have on disk"):
        dry_run.check(Model(path=str(other), dtype="fp32"), model)


@pytest.mark.parametrize("kind", [Sft, Dpo, Reward])
def test_a_stage_makes_sure_before_a_step_that_its_adapter_can_be_merged_later(
    kind: Any, tiny_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "who", "chosen": "a cook", "rejected": "rain"}\n' * 2)
    data = Data(path=str(pairs), prompt="{prompt}", completion="{chosen}") if kind is Sft else None
    adapter = Lora(rank=2, alpha=4, targets=["q_proj", "embed_tokens"])
    step = make_step(
        folder,
        data or Data(path=str(pairs), format="preference"),
        **{"kind": kind, "adapter": adapter, "steps": 2, "batch_size": 2, "save_every": 1},
    )
    why = r"could not be merged into .*: the base stores lm_head\.weight in the place of model\.embed_tokens\.weight"
    with pytest.raises(UserError, match=why):
        train(structs.replace(step, merged=True), tmp_path / "merged")
    assert not list(tmp_path.glob("merged/*/metrics.jsonl"))
    # A recipe that gets its merge after the stage has begun is told when the stage goes on.
    with pytest.raises(StoppedEarly):
        train(step, tmp_path, stop_after=1)
    with pytest.raises(UserError, match=why):
        train(structs.replace(step, merged=True), tmp_path)


def test_layers_whose_weights_kernels_read_are_left_out_and_named() -> None:
    config = Mamba2Config(vocab_size=258, hidden_size=64, state_size=16, num_hidden_layers=2, head_dim=16, num_heads=8)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert {name.rpartition(".")[2] for name in targets.names(model, Lora())} == {"in_proj"}
    with pytest.raises(UserError, match=r"'out_proj' \(the model's own kernels read its weight past an adapter\)"):
        targets.names(model, Lora(targets=["out_proj"]))


def test_experts_that_are_not_adapted_are_counted() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["qwen3_moe"]())
    told = coverage.of(model, Lora())
    assert any(line.startswith("experts: not adapted (66") for line in told.lines())
    assert coverage.of(model, Lora(experts=True)).share > 0.99
    with pytest.raises(UserError, match="no stacked experts"):
        coverage.require_few_bits(model, "nf4")


def test_experts_whose_weights_the_code_around_them_reads_have_no_adapter() -> None:
    shape: dict[str, Any] = {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 320}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            DbrxConfig(**shape, attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4})
        )
    assert any(line.endswith("of the weights); no adapter can be on them") for line in coverage.of(model, ALL).lines())
    with pytest.raises(UserError, match=r"adapter\.experts: code around DbrxExpertGLU reads its weights past"):
        adapters.attach(model, EXPERTS, None, in_fp32=True)


def test_the_skeleton_of_a_multimodal_model_is_whole_under_zero3() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["gemma3"]())
    asked = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    shapes = {name: weight.shape for name, weight in skeleton(model).state_dict().items()}
    assert asked.is_zero3()
    assert shapes == {name: weight.shape for name, weight in model.state_dict().items()}
