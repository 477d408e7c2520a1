"""What config.json alone tells of a model: its parts, how its rows have to lie, and what a loss would leave out."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from ftlaunch.recipe.model import dropout_in
from ftlaunch.recipe.stages import Pairwise, Ppo, Sft
from ftlaunch.run.spec import StageSpec

STATEFUL = {
    *("bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "inkling", "inkling2", "jamba", "kimi_linear", "lfm2"),
    *("lfm2_moe", "lfm3", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe"),
    *("qwen3_next", "qwen4_exp", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2", "zaya"),
}
"""Families whose mixers carry a state from token to token."""
CONV = "causal-conv1d"
KERNELS = {
    **dict.fromkeys(("lfm2", "lfm2_moe"), CONV),
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2"), f"{CONV}, mamba-ssm"),
    **dict.fromkeys(
        ("bailing_hybrid", "kimi_linear", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_next"),
        f"{CONV}, flash-linear-attention",
    ),
}
"""Packages whose kernels are told where rows begin, so that the state of a family's mixers ends with its row."""
RESCALED = {"rwkv"}
"""Families that multiply their weights in place between training and evaluation."""
UNSHARDED = {"qwen4_exp"}
"""Families of which processes die under ZeRO-3."""
READ_PAST = {"dbrx"}
"""Families whose code reads the weights of stacked experts past any adapter that would be on them."""
JITTERING = {"mixtral", "minimax", "minimax_m2"}
"""Families whose code multiplies the input of experts in place, by router_jitter_noise."""
STATEFUL_LAYERS = {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "hybrid", "hybrid_sliding"}
"""The same of single layers, as `layer_types` calls them."""
ATTENDING = {"attention", "full_attention", "sliding_attention"}
"""Layers without such a state; a model of a stateful family may have no others."""
BY_THEMSELVES = {
    *("big_bird", "bloom", "codegen", "falcon", "glm46v", "gpt_neo", "gpt_neox_japanese", "gptj", "megatron-bert"),
    *("mllama", "mpt", "mvp", "openai-gpt", "prophetnet", "reformer", "rembert", "roformer", "trocr", "xglm", "xlm"),
    "xlnet",
}
"""Families that attend by code of their own, in some layers at least, as Llama 3.2 does to pictures."""
DECODERS = {
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "pegasus", "plbart"),
}
"""Families whose decoders also make a mask for what an encoder said."""
BY_RANK = {
    *("axk2", "deepseek_v32", "deepseek_v4", "doge", "dots3_note", "glm5_next", "glm_moe_dsa", "hy_v4"),
    *("mistral_large4", "qwen4_exp"),
}
"""Families whose queries choose a few keys by rank."""
RANKING_LAYERS = {"compressed_sparse_attention", "indexed_attention", "minimax_m3_sparse"}
"""The same of single layers."""
STRETCHED = {"dynamic", "longrope", "su"}
"""Rotary embeddings whose frequencies depend on the longest row of a micro-batch (arXiv 2402.13753)."""
PADDED, ALONE = "rows are padded, not packed", "each row is computed by itself"
UNLESS = "rows are padded, or packed by the kernels of {}"
"""Where the packages are installed, the start finds out whether their kernels are right."""
WINDOWED = re.compile("sliding|chunked|local|recurrent|attention$")
CAPS = {
    "attn_logit_softcapping": "attention scores",
    **dict.fromkeys(("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"), "logits"),
}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
TOWERS = ("vision_config", "audio_config", "speech_config")


class Layout(Struct, frozen=True):
    """How rows are laid down, whatever `packing` says, and why."""

    rows: str
    why: str


def layout(folder: Path, longest: int) -> Layout | None:
    """Return how rows of at most `longest` tokens have to lie for the model in a folder; None where nothing tells."""
    family, kinds = _text_family(folder)
    if family == "deepseek_v4" and kinds and not kinds & RANKING_LAYERS:
        return Layout(PADDED, f"{family} attends to keys that are not the tokens of its rows")
    if family in BY_RANK or kinds & RANKING_LAYERS:
        return Layout(ALONE, f"{family} chooses the keys of a query by rank, among all that lie in its line")
    limit = _stretched_beyond(_text_config(folder))
    if limit is not None and longest > limit:
        return Layout(ALONE, f"{family} turns the positions of all rows by the longest, from {limit + 1} tokens on")
    if is_stateful(folder):
        why = f"{family} carries a state from token to token, which would run on into the next row"
        return Layout(UNLESS.format(packages), why) if (packages := KERNELS.get(family)) else Layout(PADDED, why)
    if by_itself := BY_THEMSELVES & {family, str(read_config(folder).get("model_type"))}:
        return Layout(PADDED, f"{by_itself.pop()} attends by code of its own")
    if family in DECODERS:
        return Layout(PADDED, f"{family} makes a mask for what an encoder said, too")
    return None


def layout_note(spec: StageSpec) -> str | None:
    """What is said where packing is asked for, by default too, and the model does not allow for it."""
    stage = spec.stage
    if not isinstance(stage, Sft | Pairwise | Ppo):
        return None
    longest = max((data.max_length for data in spec.data.values()), default=0)
    longest += stage.max_new_tokens if isinstance(stage, Ppo) else 0
    found = layout(Path(spec.model.path), longest)
    if found is None or (not stage.packing and found.rows != ALONE):
        return None
    shared = ", and prompts are not shared" if isinstance(stage, Pairwise) and stage.share_prompt else ""
    return f"{found.rows}{shared}: {found.why}"


def mechanisms(folder: Path) -> list[str]:
    """Return what the config says of the model's parts that a plain Llama has not, a phrase for each."""
    whole, config = read_config(folder), _text_config(folder)
    kinds = Counter(_layer_types(config))
    mixed = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in kinds.items())
    windows = [config.get(key) for key in ("sliding_window", "attention_window_size", "attention_chunk_size")]
    uses = config.get("use_sliding_window", True) and (not kinds or any(WINDOWED.search(kind) for kind in kinds))
    experts = next((config[key] for key in EXPERTS if config.get(key) and config.get("is_moe", True)), 0)
    chosen = config.get("num_experts_per_tok") or config.get("moe_topk")
    caps = [f"{capped} capped at {config[key]:g}" for key, capped in CAPS.items() if _is_number(config.get(key))]
    towers = [key.partition("_")[0] for key in TOWERS if whole.get(key)]
    return [
        *([f"layers: {mixed}"] if len(kinds) > 1 or set(kinds) - {"full_attention"} else []),
        *(f"a window of {window:,} tokens" for window in windows if uses and _is_number(window)),
        *caps,
        *([f"{experts} experts{f', {chosen} per token' if chosen else ''}"] if experts else []),
        *([f"multimodal: its {' and '.join(towers)} part is neither trained nor run"] if towers else []),
    ]


def is_stateful(folder: Path) -> bool:
    """Return whether mixers of the model in a folder carry a state from token to token."""
    family, kinds = _text_family(folder)
    return bool(kinds & STATEFUL_LAYERS) or (family in STATEFUL and not (kinds and kinds <= ATTENDING))


def _text_family(folder: Path) -> tuple[str, set[str]]:
    """The family of the text part, and the kinds of its layers."""
    config = _text_config(folder)
    # The text part of a multimodal config has a type such as "qwen3_5_text".
    return str(config.get("model_type", "")).removesuffix("_text"), set(_layer_types(config))


def name(folder: Path) -> str:
    """Return what transformers calls the family of the model in a folder; empty where nothing tells."""
    return str(read_config(folder).get("model_type", ""))


def layer_count(folder: Path) -> int | None:
    """Return how many layers the model in a folder has; None where its config has none of the usual words for it."""
    config = _text_config(folder)
    # GPT-2 and its like say n_layer, a few others num_layers.
    return next((config[word] for word in ("num_hidden_layers", "n_layer", "num_layers") if word in config), None)


def _layer_types(config: dict[str, Any]) -> list[str]:
    # Most families list the kinds of their layers in layer_types, Zamba in layers_block_type, Bamba those that attend.
    if isinstance(attending := config.get("attn_layer_indices"), list):
        return ["attention" if layer in attending else "mamba" for layer in range(config.get("num_hidden_layers", 32))]
    return [str(kind) for kind in config.get("layer_types") or config.get("layers_block_type") or ()]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and value > 0


def _stretched_beyond(config: dict[str, Any]) -> int | None:
    """Longest row that turns no other row otherwise; None where no length does. As the trainer's `packing` has it."""
    ropes = [config[key] for key in ("rope_parameters", "rope_scaling") if isinstance(config.get(key), dict)]
    # Some families have a table for each kind of layer.
    ropes += [one for rope in ropes for one in rope.values() if isinstance(one, dict)]
    scaled = [one for one in ropes if one.get("rope_type", one.get("type")) in STRETCHED]
    holders = [config, *scaled]
    limits = [one.get("original_max_position_embeddings") for one in holders]
    limits.append(config.get("max_position_embeddings"))
    return min((int(limit) for limit in limits if limit), default=None) if scaled else None


def router_loss_of(folder: Path) -> float | None:
    """Weight of the loss that balances experts, where the config asks for it by `output_router_logits`; few do."""
    config = _text_config(folder)
    weight = config.get("router_aux_loss_coef") or config.get("aux_loss_coef") or 0
    return weight if config.get("output_router_logits") and weight else None


def jitters(folder: Path) -> bool:
    """Return whether the model in a folder does so in training."""
    return name(folder) in JITTERING and _is_number(_text_config(folder).get("router_jitter_noise"))


def dropout(folder: Path) -> str:
    """Return the rates of dropout in the config, as text; empty without any."""
    return dropout_in(_text_config(folder))


def _text_config(folder: Path) -> dict[str, Any]:
    """The part of config.json that is of text, or all of it."""
    config = read_config(folder)
    return config.get("text_config") or config


def read_config(folder: Path) -> dict[str, Any]:
    """config.json; empty where there is none to be read."""
    if not folder.is_absolute():  # a hub id, whatever the working directory holds
        return {}
    try:
        config = msgspec.json.decode((folder / "config.json").read_bytes(), type=dict[str, Any])
        msgspec.convert(config.get("text_config", {}), dict[str, Any] | None)
    except (OSError, ValueError):
        return {}  # a file that loading the model will complain of
    return config
