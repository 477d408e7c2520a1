"""Which classes of transformers compute a base as a causal language model."""

import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

from ftlaunch.errors import UserError

WITH_VISION = {
    *("aria", "aya_vision", "cohere2_vision", "deepseek_vl", "exaone4_5", "glm46v", "glm4v", "glm4v_moe", "glm_ocr"),
    *("idefics3", "internvl", "kimi_k25", "lfm2_vl", "lighton_ocr", "llava", "llava_next", "llava_onevision"),
    *("mistral3", "mllama", "ovis2", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "vipllava"),
}
"""Multimodal families that transformers has no class of text alone for, and whose text needs no picture."""


def auto_class(config: Any) -> Any:
    """Return transformers' auto class that computes a model of this config as a causal language model."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if config.model_type in WITH_VISION else AutoModelForCausalLM


def auto_class_in(folder: Path) -> tuple[Any, ModuleType | None]:
    """Return that auto class for a folder that hub has judged, and the module of transformers that computes its text.

    Where layers call the registered attention rather than code of their own, the module has ALL_ATTENTION_FUNCTIONS.
    Raises UserError where transformers has no such class.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    auto = auto_class(config)
    if (family := auto._model_mapping.get(type(config), None)) is None:
        raise UserError(
            f"transformers has no causal language model of the family {config.model_type}, which {folder} is of",
            "use a base such as llama, qwen3, mistral or gemma3; for many multimodal models there is one of text alone",
        )
    # Around a text part of another family, such as mistral3's, the class itself attends to nothing.
    return auto, inspect.getmodule(AutoModelForCausalLM._model_mapping.get(type(config.get_text_config()), family))
