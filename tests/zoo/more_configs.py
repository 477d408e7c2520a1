"""Configs of further families, whose mechanisms are those of `configs` in other words or put together otherwise."""

from typing import Any

from tests.zoo.configs import (
    DELTA,
    EXPERTS,
    HEAD,
    LATENT,
    LINEAR,
    MAMBA,
    MIXED,
    OLD,
    TEXT,
    WINDOW,
    WINDOWED,
)

SHARED = {"n_routed_experts": 4, **EXPERTS}
INDEXED = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
CAPPED = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
PLAIN = {"dropout": 0.0, "pad_token_id": 1}
GLOBAL = {"num_global_key_value_heads": 2, "global_head_dim": 16, "vocab_size_per_layer_input": 320}
DECODER = {
    **{"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0},
}
OUTSIDE = {
    "image_token_id": 300,
    "boi_token_id": 301,
    "eoi_token_id": 302,
    "audio_token_id": 303,
    "video_token_id": 304,
}

MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {**HEAD, "sliding_window": None}),
    "ministral, window": ("ministral", {**HEAD, **MIXED}),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        {**EXPERTS, **HEAD, **DELTA, "num_experts": 4} | {"shared_expert_intermediate_size": 48},
    ),
    "qwen3_5, with vision": (
        "qwen3_5",
        {
            "text_config": {**TEXT, **DELTA},
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "patch_size": 14,
                "out_hidden_size": 64,
                "num_position_embeddings": 16,
            },
            "image_token_id": 300,
            "video_token_id": 301,
            "vision_start_token_id": 302,
            "vision_end_token_id": 303,
        },
    ),
    "gemma3n": (
        "gemma3n_text",
        {
            **HEAD,
            **MIXED,
            "vocab_size_per_layer_input": 320,
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 0,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0, 0.0],
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma4": (
        "gemma4_text",
        {**HEAD, **MIXED, **GLOBAL, "hidden_size_per_layer_input": 16, "final_logit_softcapping": 3.0},
    ),
    "gemma4, experts": (
        "gemma4_text",
        {
            **HEAD,
            **MIXED,
            **GLOBAL,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "gemma4, with vision": (
        "gemma4",
        {
            "text_config": {
                **TEXT,
                **MIXED,
                **GLOBAL,
                "pad_token_id": 0,
                "hidden_size_per_layer_input": 16,
                "final_logit_softcapping": 3.0,
            },
            "vision_config": None,
            "audio_config": None,
            **OUTSIDE,
        },
    ),
    "gemma4_unified": (
        "gemma4_unified_text",
        {**HEAD, **MIXED, "num_key_value_heads": 4, "final_logit_softcapping": 3.0},
    ),
    "vaultgemma": ("vaultgemma", {**HEAD, **MIXED, **CAPPED, "query_pre_attn_scalar": 16}),
    "phimoe": ("phimoe", {"num_local_experts": 4, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}),
    "biogpt": ("biogpt", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 1}),
    "xglm": ("xglm", {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4, **PLAIN}),
    "gpt_neox_japanese": (
        "gpt_neox_japanese",
        {"intermediate_multiple_size": 2, "attention_dropout": 0.0, "hidden_dropout": 0.0},
    ),
    "falcon, new": ("falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "persimmon": ("persimmon", {}),
    "starcoder2": ("starcoder2", {}),
    "cohere2_moe": ("cohere2_moe", {**MIXED, **EXPERTS, "num_experts": 4, "logit_scale": 0.3}),
    "olmo": ("olmo", {}),
    "flex_olmo": ("flex_olmo", {"num_experts": 4, "num_experts_per_tok": 2}),
    "granite_swa": ("granite_swa", {**MIXED, "logits_scaling": 3.0}),
    "granitemoe_swa": ("granitemoe_swa", {**MIXED, "num_local_experts": 4, "logits_scaling": 3.0}),
    "granitemoeshared": ("granitemoeshared", {"num_local_experts": 4, "shared_intermediate_size": 48}),
    "granitemoehybrid, dense": (
        "granitemoehybrid",
        {**MAMBA, "num_local_experts": 0, "shared_intermediate_size": 96, "layer_types": ["attention", "attention"]},
    ),
    "glm": ("glm", HEAD),
    "glm4_moe_lite": ("glm4_moe_lite", {**LATENT, **SHARED}),
    "glm_moe_dsa": ("glm_moe_dsa", {**LATENT, **SHARED, **INDEXED, "first_k_dense_replace": 1}),
    "gpt_oss, wide window": (
        "gpt_oss",
        {**HEAD, "sliding_window": 512, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "falcon_mamba": ("falcon_mamba", {"state_size": 8}),
    "nemotron_h": (
        "nemotron_h",
        {
            **HEAD,
            "layers_block_type": ["mamba", "attention", "mamba", "moe"],
            "ssm_state_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
            "use_mamba_kernels": False,
        },
    ),
    "zamba": (
        "zamba",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "num_key_value_heads": 4,
        },
    ),
    "lfm2_moe": (
        "lfm2_moe",
        {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_experts": 4, "num_dense_layers": 1},
    ),
    "smollm3, window": ("smollm3", {"num_hidden_layers": 4, "use_sliding_window": True, **WINDOWED}),
    "exaone_moe": (
        "exaone_moe",
        {
            **EXPERTS,
            **HEAD,
            **MIXED,
            "num_experts": 4,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {**HEAD, "num_experts": 4, "moe_topk": 2}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {"moe_intermediate_size": 32, "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1},
    ),
    "bitnet": ("bitnet", {}),
    "arcee": ("arcee", {}),
    "helium": ("helium", HEAD),
    "cwm": ("cwm", {**HEAD, **MIXED, "bos_token_id": 1, "pad_token_id": 1}),
    "afmoe": ("afmoe", {**HEAD, **MIXED, **EXPERTS, "num_experts": 4, "num_dense_layers": 1}),
    "jetmoe": ("jetmoe", {"kv_channels": 16, "num_local_experts": 4, "num_key_value_heads": 2}),
    "jais2": ("jais2", {}),
    "minicpm3": ("minicpm3", {**LATENT, "dim_model_base": 16}),
    "solar_open": ("solar_open", {**HEAD, **SHARED}),
    "youtu": ("youtu", LATENT),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 3.0}),
    "zaya": ("zaya", {**HEAD, "moe_intermediate_size": 32, "num_experts": 4, "router_hidden_size": 16}),
    "mimo_v2_flash": ("mimo_v2_flash", {**HEAD, **MIXED, **SHARED, "v_head_dim": 16}),
    "laguna": ("laguna", {**HEAD, **MIXED, **EXPERTS, "num_experts": 4}),
    "hy_v3": ("hy_v3", {**HEAD, **EXPERTS, "num_experts": 4}),
    "mellum": ("mellum", {**HEAD, **MIXED, **EXPERTS, "num_experts": 4}),
    "hrm_text": ("hrm_text", HEAD),
    "kimi_linear": (
        "kimi_linear",
        {**LINEAR, **LATENT, **EXPERTS, "num_local_experts": 4, "linear_head_dim": 16, "linear_num_heads": 4},
    ),
    "bailing_hybrid": (
        "bailing_hybrid",
        {
            **LATENT,
            **EXPERTS,
            **HEAD,
            **LINEAR,
            "num_local_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "deepseek_v4": (
        "deepseek_v4",
        {**HEAD, **SHARED, **INDEXED, "q_lora_rank": 24, "sliding_window": WINDOW, "o_groups": 2, "o_lora_rank": 16},
    ),
    "modernbert-decoder": (
        "modernbert-decoder",
        {
            "local_attention": WINDOW,
            "global_attn_every_n_layers": 2,
            "embedding_dropout": 0.0,
            "mlp_dropout": 0.0,
            "pad_token_id": 1,
            "bos_token_id": 2,
        },
    ),
    "gemma3, with vision, wide window": (
        "gemma3",
        {
            "text_config": {
                **TEXT,
                **MIXED,
                "sliding_window": 512,
                "query_pre_attn_scalar": 16,
                "final_logit_softcapping": 3.0,
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 300,
            "boi_token_index": 301,
            "eoi_token_index": 302,
        },
    ),
    "internlm3": ("internlm3", {**HEAD, "num_key_value_heads": 4}),
    "iquestcoder": ("iquestcoder", {**HEAD, "num_key_value_heads": 4}),
    "axk1": ("axk1", {**LATENT, **SHARED, "n_group": 1, "topk_group": 1}),
    "aria": ("aria_text", {**HEAD, "num_key_value_heads": 4}),
    "kolibri1": ("kolibri1", {**HEAD, **MIXED, **EXPERTS, "num_experts": 4}),
    "lfm3": ("lfm3", {**HEAD, **MIXED}),
    "flint": ("flint", {**HEAD, **MIXED}),
    "gpt-sw3": ("gpt-sw3", {**OLD, "attn_pdrop": 0.0}),
    "minimax_m3": ("minimax_m3_vl_text", {**HEAD, **EXPERTS, "num_local_experts": 4}),
    "dbrx": (
        "dbrx",
        {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}
        | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}}
        | {"ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}},
    ),
    "inkling": (
        "inkling_text",
        {**EXPERTS, **HEAD, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16}
        | {"sliding_window_size": WINDOW, "layer_types": ["hybrid_sliding", "hybrid"], "d_rel": 8, "rel_extent": 32}
        | {"n_routed_experts": 4, "n_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"]}
        | {"unpadded_vocab_size": 310, "logits_mup_width_multiplier": 3.0},
    ),
    "xlstm": ("xlstm", {"num_heads": 4, "chunk_size": 16, "num_blocks": 2}),
    "electra": ("electra", {**DECODER, "embedding_size": 32}),
    "roberta": ("roberta", DECODER),
}
