"""The sizes of a model as its config.json tells them: every linear layer, and how many parameters there are in all."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from ftlaunch.plan.cost import known

LIKE_GPT2 = {"gpt2"}
"""Families whose MLP is not gated, and whose norms have a bias."""
BIASED_QKV = {"qwen2", "qwen2_moe"}
QK_NORMS = {"qwen3", "qwen3_moe", "gemma3_text", "gemma3", "olmo2"}
FOUR_NORMS = {"gemma2", "gemma3_text", "gemma3"}
LIKE_LLAMA = {
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "phi3", "smollm3", "olmo2"),
    *("granite", "mixtral", "qwen2_moe", "qwen3_moe"),
}
"""Families whose layers are counted as they are; others are taken for one like Llama, and that is said."""
DISK_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


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


class Shape(Struct, frozen=True, kw_only=True):
    """A decoder-only model's sizes, in elements."""

    family: str
    width: int
    layers: int
    queries: int
    """Width of all query heads together."""
    keys: int
    """Width of all key heads together; values have the same."""
    heads: int
    mlp: int
    """Inner width of the MLP, or of one expert."""
    vocabulary: int
    is_gated: bool
    is_tied: bool
    linears: tuple[Linear, ...]
    """Of one layer, experts apart."""
    expert_parameters: int = 0
    """Of one layer."""
    experts_per_token: int = 0
    norm_parameters: int
    """Of one layer."""
    positions: int = 0
    """Learned position embeddings."""
    disk_bytes: int = 2
    """Of one weight in its file."""

    @property
    def layer_parameters(self) -> int:
        return sum(linear.parameters for linear in self.linears) + self.expert_parameters + self.norm_parameters

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.width

    @property
    def outside_parameters(self) -> int:
        """All that is in no layer: embeddings, the head where it has weights of its own, and the last norm."""
        embeddings = self.embedding_parameters * (1 if self.is_tied else 2)
        return embeddings + self.positions * self.width + (1 if self.is_gated else 2) * self.width

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.outside_parameters

    @property
    def matrix_parameters(self) -> int:
        """Weights of all linear layers in the decoder: what few-bit formats hold in few bits."""
        return self.layers * sum(linear.inputs * linear.outputs for linear in self.linears)

    @property
    def largest(self) -> int:
        """Elements of the largest single weight."""
        return max(self.embedding_parameters, *(linear.parameters for linear in self.linears))


def read(path: str) -> Shape | None:
    """The shape of the model in a folder, or of a well-known hub id; None where nothing here tells."""
    config = _config(path)
    return None if config is None else of_config(config)


def is_guess(shape: Shape) -> bool:
    """Whether the family is none that is known here."""
    return shape.family not in LIKE_LLAMA | LIKE_GPT2


def _config(path: str) -> dict[str, Any] | None:
    try:
        config = msgspec.json.decode((Path(path) / "config.json").read_bytes(), type=dict[str, Any])
    except (OSError, ValueError):
        return known.config(path)
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def of_config(config: dict[str, Any]) -> Shape | None:
    """The shape that a config describes; None where it lacks the sizes."""
    family = str(config.get("model_type", ""))
    if family in LIKE_GPT2:
        return _gpt2(config, family)
    wanted = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if not all(isinstance(config.get(name), int) for name in wanted):
        return None
    width, layers, heads, vocabulary = (int(config[name]) for name in wanted)
    head_width = config.get("head_dim") or width // heads
    queries, keys = heads * head_width, (config.get("num_key_value_heads") or heads) * head_width
    mlp = int(config.get("intermediate_size") or 4 * width)
    experts = int(config.get("num_local_experts") or config.get("num_experts") or 0)
    expert_mlp = int(config.get("moe_intermediate_size") or mlp) if experts else mlp
    linears = [*_attention(config, family, width, queries, keys)]
    if experts:
        linears.append(Linear("mlp.gate", width, experts))
    else:
        linears += _gated_mlp(family, width, mlp, bias=bool(config.get("mlp_bias")))
    norms = width * (4 if family in FOUR_NORMS else 2) + (2 * head_width if family in QK_NORMS else 0)
    return Shape(
        family=family,
        width=width,
        layers=layers,
        queries=queries,
        keys=keys,
        heads=heads,
        mlp=expert_mlp,
        vocabulary=vocabulary,
        is_gated=True,
        is_tied=bool(config.get("tie_word_embeddings", family.startswith("gemma"))),
        linears=tuple(linears),
        expert_parameters=experts * 3 * width * expert_mlp,
        experts_per_token=int(config.get("num_experts_per_tok") or 2) if experts else 0,
        norm_parameters=norms,
        disk_bytes=_disk_bytes(config),
    )


def _attention(config: dict[str, Any], family: str, width: int, queries: int, keys: int) -> Iterator[Linear]:
    bias = bool(config.get("attention_bias")) or family in BIASED_QKV
    if family == "phi3":
        yield Linear("self_attn.qkv_proj", width, queries + 2 * keys)
    else:
        yield Linear("self_attn.q_proj", width, queries, bias)
        yield Linear("self_attn.k_proj", width, keys, bias)
        yield Linear("self_attn.v_proj", width, keys, bias)
    yield Linear("self_attn.o_proj", queries, width, bool(config.get("attention_bias")))


def _gated_mlp(family: str, width: int, mlp: int, *, bias: bool) -> list[Linear]:
    if family == "phi3":
        return [Linear("mlp.gate_up_proj", width, 2 * mlp), Linear("mlp.down_proj", mlp, width)]
    return [
        Linear("mlp.gate_proj", width, mlp, bias),
        Linear("mlp.up_proj", width, mlp, bias),
        Linear("mlp.down_proj", mlp, width, bias),
    ]


def _gpt2(config: dict[str, Any], family: str) -> Shape:
    width, mlp = int(config["n_embd"]), int(config.get("n_inner") or 4 * config["n_embd"])
    return Shape(
        family=family,
        width=width,
        layers=int(config["n_layer"]),
        queries=width,
        keys=width,
        heads=int(config["n_head"]),
        mlp=mlp,
        vocabulary=int(config["vocab_size"]),
        is_gated=False,
        is_tied=bool(config.get("tie_word_embeddings", True)),
        linears=(
            Linear("attn.c_attn", width, 3 * width, bias=True),
            Linear("attn.c_proj", width, width, bias=True),
            Linear("mlp.c_fc", width, mlp, bias=True),
            Linear("mlp.c_proj", mlp, width, bias=True),
        ),
        norm_parameters=4 * width,
        positions=int(config.get("n_positions", 1024)),
        disk_bytes=_disk_bytes(config),
    )


def _disk_bytes(config: dict[str, Any]) -> int:
    return DISK_BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 2)
