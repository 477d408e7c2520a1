"""What the layers of each family are made of: its linear layers, norms and experts, as transformers builds them."""

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Struct

Config = dict[str, Any]

BIASED_QKV = {"qwen2", "qwen2_moe"}
UNBIASED_OUTPUT = {"glm", "glm4", "seed_oss"}
"""Families whose `attention_bias` does not speak of the output projection."""
QK_NORMS = {"qwen3", "qwen3_moe", "gemma3_text", "exaone4"}
"""Families with a norm of each query's and key's head."""
WIDE_QK_NORMS = {"olmo2", "olmo3", "olmoe"}
"""Families with a norm of all queries and of all keys together."""
FOUR_NORMS = {"gemma2", "gemma3_text", "glm4"}
ONE_NORM = {"cohere", "cohere2"}
LATENT = {"deepseek_v3"}
"""Families whose queries, keys and values are made of narrower ones (MLA, arXiv 2405.04434)."""
DEFAULTS: dict[str, Config] = {
    "gemma3_text": {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
    | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    "siglip_vision_model": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_channels": 3}
    | {"image_size": 224, "patch_size": 16, "vision_use_head": True},
}
"""Sizes that transformers leaves out of a config within a config where they are these."""


class Linear(Struct, frozen=True):
    """One matrix of a decoder layer."""

    name: str
    """Within the layer: `self_attn.q_proj`."""
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs + self.outputs * self.bias


class Sizes(Struct, frozen=True, kw_only=True):
    """What all families write alike in their config."""

    width: int
    layers: int
    heads: int
    queries: int
    """Width of all query heads together."""
    keys: int
    """Width of all key heads together; values have the same."""
    mlp: int
    """Inner width of the MLP."""
    experts: int = 0
    expert_mlp: int = 0


def nested(config: Config, name: str) -> Config | None:
    """The config of a part of the model; None where there is none."""
    try:
        return msgspec.convert(config.get(name), Config)
    except msgspec.ValidationError:
        return None


def attention(config: Config, family: str, sizes: Sizes) -> Iterator[Linear]:
    """The linear layers of attention, and of a recurrent mixer that computes next to it."""
    bias = bool(config.get("attention_bias")) or family in BIASED_QKV
    width, queries, keys = sizes.width, sizes.queries, sizes.keys
    if family in LATENT:
        yield from _latent(config, sizes)
        return
    if family == "falcon_h1":
        yield from _mixer(config, sizes)
    if family == "phi3":
        yield Linear("self_attn.qkv_proj", width, queries + 2 * keys)
    else:
        yield Linear("self_attn.q_proj", width, queries, bias)
        yield Linear("self_attn.k_proj", width, keys, bias)
        yield Linear("self_attn.v_proj", width, keys, bias)
    yield Linear(
        "self_attn.o_proj", queries, width, bool(config.get("attention_bias")) and family not in UNBIASED_OUTPUT
    )


def _latent(config: Config, sizes: Sizes) -> Iterator[Linear]:
    value, rope, rank = (int(config[name]) for name in ("v_head_dim", "qk_rope_head_dim", "kv_lora_rank"))
    bias = bool(config.get("attention_bias"))
    if config.get("q_lora_rank") is None:
        yield Linear("self_attn.q_proj", sizes.width, sizes.queries)
    else:
        yield Linear("self_attn.q_a_proj", sizes.width, config["q_lora_rank"], bias)
        yield Linear("self_attn.q_b_proj", config["q_lora_rank"], sizes.queries)
    yield Linear("self_attn.kv_a_proj_with_mqa", sizes.width, rank + rope, bias)
    yield Linear("self_attn.kv_b_proj", rank, sizes.heads * (int(config["qk_nope_head_dim"]) + value))
    yield Linear("self_attn.o_proj", sizes.heads * value, sizes.width, bias)


def _mixer(config: Config, sizes: Sizes) -> Iterator[Linear]:
    inner, convolved = _mixer_widths(config, sizes)
    bias = bool(config.get("mamba_proj_bias"))
    yield Linear("mamba.in_proj", sizes.width, inner + convolved + config["mamba_n_heads"], bias)
    yield Linear("mamba.out_proj", inner, sizes.width, bool(config.get("projectors_bias")))


def _mixer_widths(config: Config, sizes: Sizes) -> tuple[int, int]:
    """Width of Mamba-2's state path, and of what its convolution runs over."""
    inner = int(config.get("mamba_d_ssm") or config.get("mamba_expand", 2) * sizes.width)
    return inner, inner + 2 * config["mamba_n_groups"] * config["mamba_d_state"]


def gated_mlp(config: Config, family: str, width: int, mlp: int) -> list[Linear]:
    """The linear layers of an MLP whose activation is multiplied with a second product."""
    bias = bool(config.get("mlp_bias"))
    if family == "phi3":
        return [Linear("mlp.gate_up_proj", width, 2 * mlp), Linear("mlp.down_proj", mlp, width)]
    name = "feed_forward" if family == "falcon_h1" else "mlp"
    return [
        Linear(f"{name}.gate_proj", width, mlp, bias),
        Linear(f"{name}.up_proj", width, mlp, bias),
        Linear(f"{name}.down_proj", mlp, width, bias),
    ]


def mixture(config: Config, family: str, sizes: Sizes) -> Iterator[Linear]:
    """The linear layers of a mixture: what chooses experts, and the MLP that every token goes through."""
    shared = int(config.get("shared_expert_intermediate_size") or 0)
    shared += int(config.get("n_shared_experts") or 0) * sizes.expert_mlp
    name = "mlp.shared_experts" if family in LATENT else "mlp.shared_expert"
    if shared:
        yield Linear(f"{name}.gate_proj", sizes.width, shared)
        yield Linear(f"{name}.up_proj", sizes.width, shared)
        yield Linear(f"{name}.down_proj", shared, sizes.width)
    if family == "qwen2_moe":
        yield Linear("mlp.shared_expert_gate", sizes.width, 1)
    yield Linear("mlp.gate", sizes.width, sizes.experts, bias=family == "gpt_oss")


def expert_parameters(family: str, sizes: Sizes) -> int:
    """Elements of a layer's experts."""
    biases = 2 * sizes.expert_mlp + sizes.width if family == "gpt_oss" else 0
    return sizes.experts * (3 * sizes.width * sizes.expert_mlp + biases)


def dense_layers(config: Config, sizes: Sizes) -> int:
    """Layers of a mixture that have one MLP instead of experts."""
    if not sizes.experts:
        return 0
    listed = set(config.get("mlp_only_layers") or [])
    step, first = int(config.get("decoder_sparse_step") or 1), int(config.get("first_k_dense_replace") or 0)
    return sum(number in listed or (number + 1) % step != 0 or number < first for number in range(sizes.layers))


def other_parameters(config: Config, family: str, sizes: Sizes) -> int:
    """Elements of a layer's norms and of whatever else is no matrix."""
    norms = sizes.width * (1 if family in ONE_NORM else 4 if family in FOUR_NORMS else 2)
    if family in QK_NORMS:
        norms += 2 * (sizes.queries // sizes.heads)
    if family in WIDE_QK_NORMS:
        norms += sizes.queries + sizes.keys
    if family in LATENT:
        norms += int(config.get("q_lora_rank") or 0) + config["kv_lora_rank"]
    if family == "gpt_oss":
        norms += sizes.heads  # a sink for each head
    if family == "falcon_h1":
        inner, convolved = _mixer_widths(config, sizes)
        norms += convolved * (config["mamba_d_conv"] + bool(config.get("mamba_conv_bias", True)))
        norms += 3 * config["mamba_n_heads"] + inner * bool(config.get("mamba_rms_norm"))
    return norms


def tower_parameters(config: Config, width: int) -> int:
    """Elements of the part of a Gemma 3 that reads pictures: SigLIP, and what leads from it into the text model."""
    own = nested(config, "vision_config")
    if own is None or config.get("model_type") != "gemma3_text":
        return 0
    vision = DEFAULTS["siglip_vision_model"] | own
    inner, mlp, patch = (int(vision[name]) for name in ("hidden_size", "intermediate_size", "patch_size"))
    norm, block = 2 * inner, 4 * (inner * inner + inner) + 2 * inner * mlp + mlp + inner
    patches = (int(vision["image_size"]) // patch) ** 2
    embeddings = int(vision["num_channels"]) * patch**2 * inner + inner + patches * inner
    head = block + norm + inner if vision["vision_use_head"] else 0
    layers = int(vision["num_hidden_layers"]) * (block + 2 * norm)
    return embeddings + layers + norm + head + inner * width + inner
