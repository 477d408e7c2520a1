"""Configs of tiny models, of families that have a mechanism of their own between tokens and logits.

A family is a model type and what its config adds to `SHAPE`; of that it takes what it knows.
"""

from typing import Any

VOCABULARY, WINDOW = 320, 16
SHAPE: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "attention_dropout": 0.0},
    **{"bos_token_id": None, "eos_token_id": 257, "pad_token_id": None},
}
HEAD = {"head_dim": 16}
WINDOWED = {"sliding_window": WINDOW}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], **WINDOWED}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
DELTA = {
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **LINEAR,
}
LATENT = {
    **{"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    **{"num_key_value_heads": 4},
}
ROUTED = {**EXPERTS, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
MAMBA = {
    **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 8},
}
OLD = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
TEXT = {key: value for key, value in SHAPE.items() if key != "attention_dropout"} | HEAD

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral, window": ("mistral", {**HEAD, **WINDOWED}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "ministral3": ("ministral3", HEAD),
    "llama4": (
        "llama4_text",
        {**HEAD, "intermediate_size_mlp": 96, "num_local_experts": 4, "attention_chunk_size": 16}
        | {"num_hidden_layers": 4, "interleave_moe_layer_step": 2},
    ),
    "qwen2": ("qwen2", {}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, **WINDOWED}),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 48}),
    "qwen3": ("qwen3", HEAD),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, **HEAD, "num_experts": 4}),
    "qwen3_next": (
        "qwen3_next",
        {**EXPERTS, **HEAD, **DELTA, "num_experts": 4, "shared_expert_intermediate_size": 32},
    ),
    "qwen3_5": ("qwen3_5_text", {**HEAD, **DELTA}),
    "gemma": ("gemma", HEAD),
    "gemma2": (
        "gemma2",
        {**HEAD, **MIXED, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("gemma3_text", {**HEAD, **MIXED, "query_pre_attn_scalar": 16}),
    "gemma3, with vision": (
        "gemma3",
        {
            "text_config": {**TEXT, **MIXED, "query_pre_attn_scalar": 16},
            "vision_config": {
                **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
                **{"image_size": 28, "patch_size": 14},
            },
            **{"mm_tokens_per_image": 4, "image_token_index": 301, "boi_token_index": 302, "eoi_token_index": 303},
        },
    ),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"original_max_position_embeddings": 512}),
    "phi3, long rope": (
        "phi3",
        {
            "rope_parameters": {
                **{"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
                **{"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 32},
            },
            "original_max_position_embeddings": 32,
        },
    ),
    "phi3, window": ("phi3", {"original_max_position_embeddings": 512, **WINDOWED}),
    "gpt2": ("gpt2", {**OLD, "attn_pdrop": 0.0}),
    "gpt_bigcode": ("gpt_bigcode", {**OLD, "attn_pdrop": 0.0}),
    "gpt_neo": (
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    ),
    "gpt_neox": ("gpt_neox", {}),
    "gptj": ("gptj", {**OLD, "attn_pdrop": 0.0, "rotary_dim": 8}),
    "codegen": ("codegen", {**OLD, "attn_pdrop": 0.0, "rotary_dim": 8}),
    "openai-gpt": ("openai-gpt", {**OLD, "attn_pdrop": 0.0}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "falcon": ("falcon", {"alibi": False}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "opt": ("opt", {"ffn_dim": 96, "dropout": 0.0, "word_embed_proj_dim": 64, "pad_token_id": 1}),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}),
    "stablelm": ("stablelm", {}),
    "starcoder2, window": ("starcoder2", WINDOWED),
    "cohere": ("cohere", {"logit_scale": 0.3}),
    "cohere2": ("cohere2", {**MIXED, "logit_scale": 0.3}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", MIXED),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "olmo_hybrid": ("olmo_hybrid", DELTA),
    "granite": ("granite", {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.3}),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "logits_scaling": 3.0}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {**MAMBA, "num_local_experts": 4, "shared_intermediate_size": 48, "layer_types": ["mamba", "attention"]}
        | {"logits_scaling": 3.0},
    ),
    "deepseek_v2": ("deepseek_v2", {**LATENT, **ROUTED}),
    "deepseek_v3": ("deepseek_v3", {**LATENT, **ROUTED}),
    "deepseek_v32": (
        "deepseek_v32",
        {**LATENT, **ROUTED, "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2},
    ),
    "glm4": ("glm4", HEAD),
    "glm4_moe": ("glm4_moe", {**HEAD, **ROUTED}),
    "gpt_oss": ("gpt_oss", {**HEAD, **MIXED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mamba": ("mamba", {"state_size": 8}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 8}),
    "jamba": (
        "jamba",
        {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4}
        | {"mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False},
    ),
    "bamba": ("bamba", {**MAMBA, "attn_layer_indices": [1]}),
    "falcon_h1": ("falcon_h1", {**MAMBA, "mamba_d_ssm": 128, "lm_head_multiplier": 0.5}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "nemotron": ("nemotron", {}),
    "exaone4": ("exaone4", {**MIXED, "sliding_window_pattern": 2}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", HEAD),
    "ernie4_5": ("ernie4_5", HEAD),
    "minimax": ("minimax", {**HEAD, **LINEAR, "num_local_experts": 4, "block_size": 16}),
    "minimax_m2": ("minimax_m2", {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {**HEAD, "num_hidden_layers": 3, "lru_width": 64, "attention_window_size": WINDOW, "logits_soft_cap": 3.0},
    ),
    "rwkv": ("rwkv", {"context_length": 512}),
    "seed_oss": ("seed_oss", {**HEAD, "residual_dropout": 0.0}),
    "apertus": ("apertus", {}),
    "dots1": ("dots1", {**ROUTED, **MIXED, "n_shared_experts": 1}),
    "diffllama": ("diffllama", {}),
    "doge": ("doge", {"keep_window_size": 8}),
    "nanochat": ("nanochat", {"final_logit_softcapping": 3.0}),
    "zamba2": (
        "zamba2",
        {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "mamba_d_state": 16}
        | {"n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 8, "use_mem_rope": True, "num_key_value_heads": 4},
    ),
}
