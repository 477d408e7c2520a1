"""What config.json alone tells of a model: whether its rows can lie end to end, and what a loss would leave out."""

from pathlib import Path
from typing import Any

import msgspec

STATEFUL = {
    *("bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "inkling", "inkling2", "jamba", "kimi_linear", "lfm2"),
    *("lfm2_moe", "lfm3", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe"),
    *("qwen3_next", "qwen4_exp", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2", "zaya"),
}
"""Families whose mixers carry a state from token to token."""
STATEFUL_LAYERS = {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "hybrid", "hybrid_sliding"}
"""The same of single layers, as `layer_types` calls them."""
BY_THEMSELVES = {
    *("bloom", "codegen", "falcon", "gpt_neo", "gpt_neox_japanese", "gptj"),
    *("mpt", "openai-gpt", "xglm", "xlm", "xlnet"),
}
"""Families that attend by code of their own."""
BY_RANK = {"axk2", "deepseek_v32", "deepseek_v4", "dots3_note", "glm5_next", "glm_moe_dsa", "hy_v4", "mistral_large4"}
"""Families whose queries choose a few keys by rank."""


def padded_because(folder: Path) -> str | None:
    """Why the rows of the model in a folder are padded whatever `packing` says; None where nothing tells so."""
    config = _text_config(folder)
    # The text part of a multimodal config has a type such as "qwen3_5_text".
    family = str(config.get("model_type", "")).removesuffix("_text")
    # Most families list the kinds of their layers in layer_types, Zamba in layers_block_type.
    layers = {str(kind) for kind in config.get("layer_types") or config.get("layers_block_type") or ()}
    if family in STATEFUL or layers & STATEFUL_LAYERS:
        return f"{family} carries a state from token to token, which would run on into the next row"
    if family in BY_THEMSELVES:
        return f"{family} attends by code of its own"
    if family in BY_RANK:
        return f"{family} chooses the keys of a query by rank, among all that lie in its line"
    return None


def router_loss_of(folder: Path) -> float | None:
    """Weight of the loss that balances experts, where the config asks for it by `output_router_logits`; few do."""
    config = _text_config(folder)
    weight = config.get("router_aux_loss_coef") or config.get("aux_loss_coef") or 0
    return weight if config.get("output_router_logits") and weight else None


def _text_config(folder: Path) -> dict[str, Any]:
    """config.json, or the part of it that is of text; empty where there is none to be read."""
    try:
        config = msgspec.json.decode((folder / "config.json").read_bytes(), type=dict[str, Any])
        return msgspec.convert(config.get("text_config", config), dict[str, Any])
    except (OSError, ValueError):
        return {}  # a hub id, or a file that loading the model will complain of
