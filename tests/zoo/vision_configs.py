"""Configs of families that transformers knows with pictures alone: their text is what is trained."""

from typing import Any

from tests.zoo.configs import EXPERTS, LATENT, MIXED, ROUTED, TEXT

TOWER = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
QWEN_TOWER = {
    **{"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14, "intermediate_size": 48},
    **{"out_hidden_size": 64, "fullatt_block_indexes": [0]},
}
QWEN3_TOWER = {**QWEN_TOWER, "hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
QWEN_IDS = {
    **{"image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303},
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
HALF_TURNED = {
    "rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5},
}
GLM_IDS = {
    **{"image_token_id": 300, "video_token_id": 301, "image_start_token_id": 302, "image_end_token_id": 303},
    **{"video_start_token_id": 304, "video_end_token_id": 305},
}
IMAGE = {"image_token_index": 301}


def _of(kind: str, **text: Any) -> dict[str, Any]:
    return {"text_config": {**TEXT, "model_type": kind, **text}, "vision_config": TOWER, **IMAGE}


VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral3, with vision": ("mistral3", _of("mistral") | {"vision_config": {**TOWER, "model_type": "pixtral"}}),
    "llava, with vision": ("llava", _of("llama") | {"vision_config": {**TOWER, "model_type": "clip_vision_model"}}),
    "llava of gemma2, with vision": (
        "llava",
        _of("gemma2", query_pre_attn_scalar=16, attn_logit_softcapping=5.0, final_logit_softcapping=3.0, **MIXED)
        | {"vision_config": {**TOWER, "model_type": "clip_vision_model"}},
    ),
    "llava_next, with vision": ("llava_next", _of("mistral", sliding_window=None)),
    "qwen2_vl, with vision": ("qwen2_vl", {"text_config": TEXT | MROPE, "vision_config": QWEN_TOWER, **QWEN_IDS}),
    "qwen2_5_vl, with vision": ("qwen2_5_vl", {"text_config": TEXT | MROPE, "vision_config": QWEN_TOWER, **QWEN_IDS}),
    "qwen3_vl, with vision": ("qwen3_vl", {"text_config": TEXT | MROPE, "vision_config": QWEN3_TOWER, **QWEN_IDS}),
    "qwen3_vl_moe, with vision": (
        "qwen3_vl_moe",
        {"text_config": TEXT | MROPE | EXPERTS | {"num_experts": 4}, "vision_config": QWEN3_TOWER, **QWEN_IDS},
    ),
    "internvl, with vision": ("internvl", _of("qwen2")),
    "smolvlm, with vision": ("smolvlm", _of("llama")),
    "idefics3, with vision": ("idefics3", _of("llama")),
    "lfm2_vl, with vision": ("lfm2_vl", _of("lfm2", layer_types=["conv", "full_attention"])),
    "aya_vision, with vision": ("aya_vision", _of("cohere2")),
    "cohere2_vision, with vision": ("cohere2_vision", _of("cohere2")),
    "glm4v, with vision": ("glm4v", {"text_config": TEXT | MROPE, "vision_config": QWEN_TOWER, **QWEN_IDS}),
    "llava_onevision, with vision": ("llava_onevision", _of("qwen2")),
    "vipllava, with vision": (
        "vipllava",
        _of("llama") | {"vision_config": {**TOWER, "model_type": "clip_vision_model"}},
    ),
    "mllama, with vision": (
        "mllama",
        {
            "text_config": {
                **TEXT,
                "bos_token_id": 1,
                "pad_token_id": 0,
                "num_hidden_layers": 3,
                "cross_attention_layers": [1],
            },
            "vision_config": {
                **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_global_layers": 1},
                **{"attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_output_dim": 64},
                **{"intermediate_layers_indices": [0], "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]},
            },
        },
    ),
    "exaone4_5, with vision": (
        "exaone4_5",
        {"text_config": {**TEXT, "model_type": "exaone4"}, "vision_config": QWEN_TOWER, **QWEN_IDS},
    ),
    "deepseek_vl, with vision": ("deepseek_vl", _of("llama")),
    "ovis2, with vision": ("ovis2", {"text_config": {**TEXT, "model_type": "qwen2"}}),
    "lighton_ocr, with vision": (
        "lighton_ocr",
        {"text_config": {**TEXT, "model_type": "qwen3"}, "vision_config": {**TOWER, "model_type": "pixtral"}}
        | {"image_token_id": 301},
    ),
    "glm4v_moe, with vision": (
        "glm4v_moe",
        {
            "text_config": TEXT | HALF_TURNED | EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1},
            **{"vision_config": QWEN_TOWER, **GLM_IDS},
        },
    ),
    "glm46v, with vision": (
        "glm46v",
        {
            "text_config": TEXT | HALF_TURNED | {"model_type": "glm4v_text"},
            "vision_config": {**QWEN_TOWER, "model_type": "glm4v_vision"},
            **GLM_IDS,
        },
    ),
    "glm_ocr, with vision": ("glm_ocr", {"text_config": TEXT | HALF_TURNED, "vision_config": QWEN_TOWER, **GLM_IDS}),
    "kimi_k25, with vision": (
        "kimi_k25",
        {
            "text_config": TEXT | LATENT | ROUTED | {"model_type": "deepseek_v3", "head_dim": 8},
            "vision_config": {
                **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
                **{"pos_emb_height": 4, "pos_emb_width": 4},
            },
            **{"projection_hidden_size": 32, **QWEN_IDS},
        },
    ),
    "aria, with vision": ("aria", _of("aria_text", moe_num_experts=4)),
}
