"""How many parameters a model has, from its config.json alone, against transformers and against what was published."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ftlaunch.plan.cost import shape

SMALL = {"hidden_size": 96, "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 2}
SMALL |= {"intermediate_size": 160, "vocab_size": 321}
MIXTURE = {"num_experts": 4, "moe_intermediate_size": 48}
TINY_VISION = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "image_size": 56, "patch_size": 14}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, SMALL) for family in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")},
    **{family: (family, SMALL) for family in ("phi3", "smollm3", "olmo2", "olmo3", "granite", "ernie4_5", "seed_oss")},
    **{family: (family, SMALL) for family in ("glm", "glm4", "exaone4", "cohere", "cohere2")},
    **{family: (family, SMALL | {"num_local_experts": 4}) for family in ("mixtral", "granitemoe", "gpt_oss")},
    "llama with biases": ("llama", SMALL | {"attention_bias": True, "mlp_bias": True}),
    "olmoe": ("olmoe", SMALL | {"num_experts": 4}),
    "qwen2_moe": ("qwen2_moe", SMALL | MIXTURE | {"shared_expert_intermediate_size": 80}),
    "qwen3_moe": ("qwen3_moe", SMALL | MIXTURE | {"mlp_only_layers": [0, 2]}),
    "qwen3_moe in every second layer": ("qwen3_moe", SMALL | MIXTURE | {"decoder_sparse_step": 2}),
    "gpt2": ("gpt2", {"n_embd": 96, "n_layer": 3, "n_head": 6, "vocab_size": 321}),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3 with wide queries": ("deepseek_v3", {"q_lora_rank": None, "num_hidden_layers": 4}),
    "falcon_h1": ("falcon_h1", {}),
    "falcon_h1 with a norm": ("falcon_h1", {"mamba_rms_norm": True, "mamba_proj_bias": True, "projectors_bias": True}),
    "gemma3": ("gemma3", {"text_config": {"model_type": "gemma3_text", **SMALL}, "vision_config": TINY_VISION}),
    "gemma3 as it is by default": ("gemma3", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_that_transformers_makes(name: str) -> None:
    """`save_pretrained` writes `to_diff_dict`: it leaves out what is the default of a config within the config."""
    family, sizes = CASES[name]
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(family, **tokens, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = shape.of_config(config.to_diff_dict())
    assert found is not None
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert not shape.is_guess(found)


GEMMA_3_4B = {
    "model_type": "gemma3",
    "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text"}
    | {"num_hidden_layers": 34, "sliding_window": 1024},
    "vision_config": {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "num_hidden_layers": 27}
    | {"model_type": "siglip_vision_model", "num_attention_heads": 16, "patch_size": 14, "vision_use_head": False},
}
QWEN3_30B_A3B = {"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32}
QWEN3_30B_A3B |= {"num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768}
QWEN3_30B_A3B |= {"num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936, "tie_word_embeddings": False}
GPT_OSS = {"model_type": "gpt_oss", "hidden_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8}
GPT_OSS |= {"head_dim": 64, "intermediate_size": 2880, "vocab_size": 201088, "attention_bias": True}
GPT_OSS |= {"tie_word_embeddings": False, "num_experts_per_tok": 4}


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (GEMMA_3_4B, 4.300),
        (QWEN3_30B_A3B, 30.532),
        (GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32}, 20.91),
        (GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128}, 116.83),
    ],
)
def test_parameters_are_those_that_model_cards_tell(config: dict[str, Any], billions: float) -> None:
    """Gemma 3 4B: 4.3e9 on its page of the hub. Qwen3-30B-A3B: 30.5e9 (arXiv 2505.09388, table 2). gpt-oss: 20.91e9
    and 116.83e9 (model card, arXiv 2508.10925, table 1)."""
    found = shape.of_config(config)
    assert found is not None
    assert found.parameters / 1e9 == pytest.approx(billions, abs=0.006)
