"""What a plan says of a model from config.json and the headers of its weight files, without torch."""

import json
from pathlib import Path
from typing import Any

import pytest

from ftlaunch.load import load_recipe
from ftlaunch.plan import family
from ftlaunch.plan.cost import body
from ftlaunch.plan.plan import make_plan
from ftlaunch.recipe.adapter import Lora
from ftlaunch.rules import find_problems

RECIPE = """
name = "family"
model.path = "{model}"
[adapter]
kind = "lora"
[data.rows]
path = "owner/rows"
prompt = "{{q}}"
completion = "{{a}}"
[[stage]]
kind = "sft"
data = "rows"
"""
ATTENTION = {f"model.layers.{layer}.self_attn.q_proj.weight": [10, 10] for layer in (0, 1)}
STACKED = {f"model.layers.{layer}.mlp.experts.gate_up_proj": [4, 20, 10] for layer in (0, 1)}
ENDS = {"model.embed_tokens.weight": [1000, 10], "lm_head.weight": [1000, 10], "model.norm.weight": [10]}
ROUTERS = {f"model.layers.{layer}.mlp.gate.weight": [4, 10] for layer in (0, 1)}
MOE = {**ATTENTION, **STACKED, **ENDS, **ROUTERS}
"""200 weights of attention, 1,600 of experts and 80 of routers."""


def write(folder: Path, tensors: dict[str, list[int]], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header = {key: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for key, shape in tensors.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    return folder


def loaded(model: Path, *settings: str) -> Any:
    path = model.parent / "recipe.toml"
    path.write_text(RECIPE.format(model=model))
    return load_recipe(path, settings)


def notes(model: Path, *settings: str) -> dict[str, str]:
    return make_plan(loaded(model, *settings).recipe, model.parent / "run").stages[0].notes


def problems(model: Path, *settings: str) -> list[str]:
    # Of the header alone no model can be loaded, which is what model.path says.
    found = find_problems(loaded(model, *settings))
    return [f"{problem.key}: {problem.message}" for problem in found if problem.key != "model.path"]


@pytest.mark.parametrize(
    ("tensors", "adapter", "share"),
    [
        (MOE, Lora(), 200 / 1880),
        (MOE, Lora(experts=True), 1800 / 1880),
        (MOE, Lora(experts=True, layers=[1]), 900 / 1880),
        (MOE, Lora(layers="super-weights"), None),
        (MOE, Lora(targets=["k_proj"]), None),
        (MOE, Lora(targets="model.layers.0.*"), 100 / 1880),
        # Experts on disk one by one, as before transformers 5.
        ({**ATTENTION, "model.layers.0.block_sparse_moe.experts.3.w1.weight": [30, 10]}, Lora(), 200 / 500),
        # Stacked in a module that is not called after them, as Granite's.
        ({**ATTENTION, "model.layers.0.block_sparse_moe.input_linear.weight": [3, 10, 10]}, Lora(), 200 / 500),
        ({**ATTENTION, "model.layers.0.mlp.shared_experts.up_proj.weight": [10, 10]}, Lora(), 1.0),
        ({**ATTENTION, "vision_tower.layers.0.q_proj.weight": [90, 90]}, Lora(), 1.0),
        ({**ATTENTION, "model.layers.0.conv.conv.weight": [10, 1, 30]}, Lora(), 200 / 500),
        # MXFP4: two weights in a byte, and their scales.
        (
            {
                **ATTENTION,
                "model.layers.0.mlp.experts.down_proj_blocks": [3, 10, 1, 5],
                "model.layers.0.mlp.experts.down_proj_scales": [3, 10, 1],
            },
            Lora(),
            200 / 500,
        ),
    ],
)
def test_weights_are_counted_as_the_trainer_adapts_them(
    tensors: dict[str, list[int]], adapter: Lora, share: float | None, tmp_path: Path
) -> None:
    counted = body.read(str(write(tmp_path / "model", tensors)))
    assert counted is not None
    assert counted.adapted_share(adapter) == pytest.approx(share)


def test_the_plan_says_how_much_is_adapted_and_that_experts_are_not(tmp_path: Path) -> None:
    model = write(tmp_path / "model", MOE)
    assert notes(model)["adapted"] == (
        "about 10.6% of the body's weights; experts are not (85.1%): adapter.experts = true adapts them"
    )
    assert notes(model, "adapter.experts=true", "adapter.dropout=0")["adapted"] == "about 95.7% of the body's weights"
    (model / "model.safetensors").write_bytes(b"no weights at all")
    assert "adapted" not in notes(model)


def test_a_config_alone_tells_of_a_family_whose_layers_are_known(tmp_path: Path) -> None:
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    more = {"vocab_size": 32000, "intermediate_size": 14336, "num_local_experts": 8}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", **sizes, **more}))
    counted = body.read(str(tmp_path))
    assert counted is not None
    assert counted.adapted_share(Lora()) == pytest.approx(0.029, abs=0.001)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of", **sizes, **more}))
    assert body.read(str(tmp_path)) is None


def test_experts_that_are_not_there_and_few_bits_that_reach_too_little_are_refused(tmp_path: Path) -> None:
    moe, dense = write(tmp_path / "moe", MOE), write(tmp_path / "dense", ATTENTION)
    plain = ("adapter.dropout=0", "parallel.device=cpu")
    assert problems(moe, "adapter.experts=true", *plain) == problems(dense, "model.quantization=nf4", *plain) == []
    assert problems(dense, "adapter.experts=true", *plain) == [
        "adapter.experts: asks for experts, and the model has none"
    ]
    assert problems(moe, "model.quantization=int8", *plain) == [
        'model.quantization: "int8" would leave the experts in 16 bits, which are 85% of the body\'s weights'
    ]


def test_experts_that_no_adapter_can_be_on_are_refused_and_not_advised(tmp_path: Path) -> None:
    model = write(tmp_path / "model", MOE, model_type="dbrx")
    assert problems(model, "adapter.experts=true", "adapter.dropout=0", "parallel.device=cpu") == [
        "adapter.experts: does not go with dbrx, whose code reads the weights of experts past an adapter"
    ]
    assert notes(model)["adapted"].endswith("experts are not (85.1%): no adapter can be on them")


def test_weights_that_are_multiplied_in_place_are_neither_quantized_nor_sharded(tmp_path: Path) -> None:
    model, plain = (
        write(tmp_path / "model", {}, model_type="rwkv"),
        ("parallel.device=cpu", "parallel.procs_per_node=2"),
    )
    why = "does not go with rwkv, whose code multiplies weights in place"
    assert problems(model, "parallel.strategy=zero2", *plain) == []
    assert problems(model, "parallel.strategy=zero3", *plain) == [f"parallel.strategy: {why}"]
    assert problems(model, "model.quantization=nf4", "parallel.device=cpu") == [f"model.quantization: {why}"]


def test_a_model_that_kills_processes_when_it_is_sharded_is_not_sharded(tmp_path: Path) -> None:
    model = write(tmp_path / "model", {}, model_type="qwen4_exp_text")
    two = ("parallel.device=cpu", "parallel.procs_per_node=2")
    assert problems(model, "parallel.strategy=zero2", *two) == []
    why = "does not go with qwen4_exp_text, of which processes die under ZeRO-3"
    assert problems(model, "parallel.strategy=zero3", *two) == [f"parallel.strategy: {why}"]


def test_jitter_that_changes_the_input_of_trained_experts_in_place_is_not_sharded(tmp_path: Path) -> None:
    model = write(tmp_path / "model", MOE, model_type="mixtral", router_jitter_noise=0.01)
    plain = ("parallel.device=cpu", "parallel.procs_per_node=2")
    sharded = ("parallel.strategy=zero3", *plain)
    why = "does not go with experts that are trained and router_jitter_noise, which changes their input in place"
    assert problems(model, "adapter.kind=full", *sharded) == [f"parallel.strategy: {why}"]
    assert problems(model, "adapter.experts=true", "adapter.dropout=0", *sharded) == [f"parallel.strategy: {why}"]
    assert problems(model, *sharded) == []
    assert problems(model, "adapter.kind=full", "parallel.strategy=zero2", *plain) == []
    write(model, MOE, model_type="mixtral", router_jitter_noise=0.0)
    assert problems(model, "adapter.kind=full", *sharded) == []


def test_layers_are_those_of_the_text_part(tmp_path: Path) -> None:
    model = write(tmp_path / "model", ATTENTION, text_config={"num_hidden_layers": 2}, vision_config={"layers": 9})
    assert problems(model, "adapter.layers=[0, 1]") == []
    assert problems(model, "adapter.layers=[0, 2]") == [
        "adapter.layers: names layer 2, and the model has 2, counted from 0"
    ]


WINDOWED = {"sliding_window": 512, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
SCALED = {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "llama"}, []),
        ({"use_sliding_window": False, "sliding_window": 512}, []),
        (WINDOWED, ["layers: 2 sliding attention, 1 full attention", "a window of 512 tokens"]),
        ({"attn_logit_softcapping": 50.0}, ["attention scores capped at 50"]),
        ({"num_local_experts": 8, "num_experts_per_tok": 2}, ["8 experts, 2 per token"]),
        (
            {"text_config": {"num_experts": 4}, "vision_config": {"depth": 2}},
            ["4 experts", "multimodal: its vision part is neither trained nor run"],
        ),
    ],
)
def test_a_config_tells_of_windows_caps_experts_and_towers(
    config: dict[str, Any], said: list[str], tmp_path: Path
) -> None:
    assert family.mechanisms(write(tmp_path / "model", {}, **config)) == said


@pytest.mark.parametrize(
    ("config", "longest", "rows"),
    [
        (SCALED, 512, None),
        (SCALED, 513, family.ALONE),
        ({"rope_parameters": {"rope_type": "dynamic"}, "max_position_embeddings": 600}, 601, family.ALONE),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}, "max_position_embeddings": 6}, 601, None),
        ({"model_type": "deepseek_v32"}, 8, family.ALONE),
        ({"model_type": "doge"}, 8, family.ALONE),
        ({"model_type": "jamba"}, 8, family.PADDED),
        ({"model_type": "lfm2"}, 8, family.UNLESS.format("causal-conv1d")),
        ({"model_type": "bamba", "num_hidden_layers": 2, "attn_layer_indices": [0, 1]}, 8, None),
        ({"model_type": "bart"}, 8, family.PADDED),
        ({"model_type": "minimax_m3_vl_text", "layer_types": ["minimax_m3_sparse"]}, 8, family.ALONE),
        ({"model_type": "mllama", "text_config": {"model_type": "mllama_text_model"}}, 8, family.PADDED),
        ({"model_type": "jamba", "layer_types": ["mamba", "full_attention"]}, 8, family.PADDED),
        ({"model_type": "lfm2", "layer_types": ["full_attention", "full_attention"]}, 8, None),
        ({"model_type": "deepseek_v4", "layer_types": ["heavily_compressed_attention"]}, 8, family.PADDED),
    ],
)
def test_a_config_tells_how_rows_have_to_lie(
    config: dict[str, Any], longest: int, rows: str | None, tmp_path: Path
) -> None:
    found = family.layout(write(tmp_path / "model", {}, **config), longest)
    assert (found and found.rows) == rows
