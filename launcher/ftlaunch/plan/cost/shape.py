"""The sizes of a model as its config.json tells them: every linear layer, and how many parameters there are in all."""

from pathlib import Path
from typing import Any

from msgspec.structs import asdict, replace

from ftlaunch.plan.cost import families, known
from ftlaunch.plan.cost.families import Linear, Sizes
from ftlaunch.plan.family import read_config
from ftlaunch.recipe.names import is_local

LIKE_GPT2 = {"gpt2"}
"""Families whose MLP is not gated, and whose norms have a bias."""
LIKE_LLAMA = {
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2"),
    *("olmo3", "glm4", "exaone4", "seed_oss", "granite", "ernie4_5"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss"),
}
"""Families whose layers are counted as they are; others are taken for one like Llama, and that is said."""
ONLY_COUNTED = {"deepseek_v3", "falcon_h1", "cohere", "cohere2", "glm"}
"""Families whose weights are counted as they are, but not what their layers keep for the backward pass."""
DISK_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Shape(Sizes, frozen=True, kw_only=True):
    """A decoder-only model's sizes, in elements; `mlp` is the inner width of one expert in a mixture."""

    family: str
    vocabulary: int
    is_gated: bool
    is_tied: bool
    linears: tuple[Linear, ...]
    """Linear layers of one block, experts apart."""
    expert_parameters: int = 0
    """Parameters of one block's experts."""
    experts_per_token: int = 0
    norm_parameters: int
    """Parameters of one block's norms, with whatever else in it is no matrix."""
    uneven_parameters: int = 0
    """What the model has more, or less, than layers that are all alike: dense layers of a mixture, a vision tower."""
    positions: int = 0
    """Learned position embeddings."""
    disk_bytes: int = 2
    """Bytes of one weight in its file."""
    attention_dropout: bool = False
    """Whether the model's own config drops out of attention's probabilities; only SFT leaves it on."""
    hidden_dropout: bool = False
    """The same of what attention and MLP add to the stream."""

    @property
    def layer_parameters(self) -> int:
        return sum(linear.parameters for linear in self.linears) + self.expert_parameters + self.norm_parameters

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.width

    @property
    def outside_parameters(self) -> int:
        """All that is in no layer like the others: embeddings, a head with weights of its own, the last norm."""
        embeddings = self.embedding_parameters * (1 if self.is_tied else 2)
        last_norm = (1 if self.is_gated else 2) * self.width
        return embeddings + self.positions * self.width + last_norm + self.uneven_parameters

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
    config = read_config(Path(path)) if is_local(path) else known.config(path)
    return of_config(config or {})


def is_guess(shape: Shape) -> bool:
    """Whether the family is none that is known here."""
    return shape.family not in LIKE_LLAMA | LIKE_GPT2 | ONLY_COUNTED


def of_config(config: dict[str, Any]) -> Shape | None:
    """The shape that a config describes; None where it lacks the sizes."""
    # A multimodal config nests the text part's sizes, and leaves out those that are its family's defaults.
    if (text := families.nested(config, "text_config")) is not None:
        config = {**config, **families.DEFAULTS.get(str(text.get("model_type")), {}), **text}
    family = str(config.get("model_type", ""))
    if family in LIKE_GPT2:
        return _gpt2(config, family)
    wanted = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if not all(isinstance(config.get(name), int) for name in wanted):
        return None
    sizes, vocabulary = _sizes(config, family), int(config["vocab_size"])
    linears = list(families.attention(config, family, sizes))
    dense = families.gated_mlp(config, family, sizes.width, sizes.mlp)
    mixture = list(families.mixture(config, family, sizes)) if sizes.experts else []
    of_experts = families.expert_parameters(family, sizes)
    in_mixture = of_experts + sum(linear.parameters for linear in mixture)
    # Some mixtures begin with dense layers. All layers are counted as mixtures, and the difference is added once.
    more = sum(linear.parameters for linear in dense) - in_mixture
    uneven = families.dense_layers(config, sizes) * more + families.tower_parameters(config, sizes.width)
    inner = sizes.expert_mlp if sizes.experts else sizes.mlp
    return Shape(
        **asdict(replace(sizes, mlp=inner)),
        family=family,
        vocabulary=vocabulary,
        is_gated=True,
        is_tied=bool(config.get("tie_word_embeddings", family.startswith(("gemma", "cohere")))),
        linears=(*linears, *(mixture or dense)),
        expert_parameters=of_experts,
        experts_per_token=int(config.get("num_experts_per_tok") or 2) if sizes.experts else 0,
        norm_parameters=families.other_parameters(config, family, sizes),
        attention_dropout=bool(config.get("attention_dropout")),
        uneven_parameters=uneven,
        disk_bytes=_disk_bytes(config),
    )


def _sizes(config: dict[str, Any], family: str) -> Sizes:
    width, layers, heads = (int(config[name]) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    # Not always width / heads: Gemma and Qwen3 have heads of a width of their own.
    head_width = int(config.get("head_dim") or width // heads)
    key_heads = int(config.get("num_key_value_heads") or heads)
    if family in families.LATENT:
        head_width, key_heads = int(config["qk_nope_head_dim"]) + int(config["qk_rope_head_dim"]), heads
    mlp = int(config.get("intermediate_size") or 4 * width)
    # Mixtral and gpt-oss, Qwen, and DeepSeek: each family has a key of its own for the same number.
    named = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((int(config[name]) for name in named if config.get(name)), 0)
    return Sizes(
        width=width,
        layers=layers,
        heads=heads,
        queries=heads * head_width,
        keys=key_heads * head_width,
        mlp=mlp,
        experts=experts,
        expert_mlp=int(config.get("moe_intermediate_size") or mlp),
    )


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
        attention_dropout=bool(config.get("attn_pdrop", 0.1)),
        hidden_dropout=bool(config.get("resid_pdrop", 0.1)),
        disk_bytes=_disk_bytes(config),
    )


def _disk_bytes(config: dict[str, Any]) -> int:
    return DISK_BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 2)


NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in 4 bits: half a byte, a scale in 8 bits for 64 of them, and one in fp32 for 256 of those."""


def held_bytes(shape: Shape, quantization: str, size: int) -> int:
    """Return the bytes of all weights, in elements of `size` bytes where they are not in few bits."""
    few = {"nf4": NF4, "fp4": NF4, "int8": 1.0}.get(quantization, float(size))
    # Only linear layers are held in few bits: embeddings, head and norms stay as they are.
    return int(few * shape.matrix_parameters) + size * (shape.parameters - shape.matrix_parameters)


def cache_bytes(shape: Shape, rows: int, tokens: int, size: int) -> int:
    """Return the bytes of the keys and values of so many rows of so many tokens."""
    # The 2 stands for keys and values. Under grouped queries both have the width of the key heads alone.
    return rows * tokens * shape.layers * 2 * shape.keys * size
