"""The sizes of well-known bases, so that a hub id can be planned for without a network.

From the config.json that each of them is published with.
"""

from typing import Any

COLUMNS = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "vocab_size", "tie_word_embeddings"),
)
LIKE_LLAMA: dict[str, tuple[str, int, int, int, int, int, int, int, bool]] = {
    "meta-llama/Llama-2-7b-hf": ("llama", 4096, 32, 32, 32, 128, 11008, 32000, False),
    "meta-llama/Llama-2-13b-hf": ("llama", 5120, 40, 40, 40, 128, 13824, 32000, False),
    "meta-llama/Llama-2-70b-hf": ("llama", 8192, 80, 64, 8, 128, 28672, 32000, False),
    "meta-llama/Meta-Llama-3-8B": ("llama", 4096, 32, 32, 8, 128, 14336, 128256, False),
    "meta-llama/Meta-Llama-3-70B": ("llama", 8192, 80, 64, 8, 128, 28672, 128256, False),
    "meta-llama/Llama-3.2-1B": ("llama", 2048, 16, 32, 8, 64, 8192, 128256, True),
    "meta-llama/Llama-3.2-3B": ("llama", 3072, 28, 24, 8, 128, 8192, 128256, True),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": ("llama", 2048, 22, 32, 4, 64, 5632, 32000, False),
    "HuggingFaceTB/SmolLM2-135M": ("llama", 576, 30, 9, 3, 64, 1536, 49152, True),
    "HuggingFaceTB/SmolLM2-360M": ("llama", 960, 32, 15, 5, 64, 2560, 49152, True),
    "HuggingFaceTB/SmolLM2-1.7B": ("llama", 2048, 24, 32, 32, 64, 8192, 49152, True),
    "mistralai/Mistral-7B-v0.1": ("mistral", 4096, 32, 32, 8, 128, 14336, 32000, False),
    "mistralai/Mistral-7B-v0.3": ("mistral", 4096, 32, 32, 8, 128, 14336, 32768, False),
    "mistralai/Mixtral-8x7B-v0.1": ("mixtral", 4096, 32, 32, 8, 128, 14336, 32000, False),
    "Qwen/Qwen2.5-0.5B": ("qwen2", 896, 24, 14, 2, 64, 4864, 151936, True),
    "Qwen/Qwen2.5-1.5B": ("qwen2", 1536, 28, 12, 2, 128, 8960, 151936, True),
    "Qwen/Qwen2.5-3B": ("qwen2", 2048, 36, 16, 2, 128, 11008, 151936, True),
    "Qwen/Qwen2.5-7B": ("qwen2", 3584, 28, 28, 4, 128, 18944, 152064, False),
    "Qwen/Qwen2.5-14B": ("qwen2", 5120, 48, 40, 8, 128, 13824, 152064, False),
    "Qwen/Qwen2.5-32B": ("qwen2", 5120, 64, 40, 8, 128, 27648, 152064, False),
    "Qwen/Qwen2.5-72B": ("qwen2", 8192, 80, 64, 8, 128, 29568, 152064, False),
    "Qwen/Qwen3-0.6B": ("qwen3", 1024, 28, 16, 8, 128, 3072, 151936, True),
    "Qwen/Qwen3-1.7B": ("qwen3", 2048, 28, 16, 8, 128, 6144, 151936, True),
    "Qwen/Qwen3-4B": ("qwen3", 2560, 36, 32, 8, 128, 9728, 151936, True),
    "Qwen/Qwen3-8B": ("qwen3", 4096, 36, 32, 8, 128, 12288, 151936, False),
    "Qwen/Qwen3-32B": ("qwen3", 5120, 64, 64, 8, 128, 25600, 151936, False),
    "google/gemma-2b": ("gemma", 2048, 18, 8, 1, 256, 16384, 256000, True),
    "google/gemma-7b": ("gemma", 3072, 28, 16, 16, 256, 24576, 256000, True),
    "google/gemma-2-2b": ("gemma2", 2304, 26, 8, 4, 256, 9216, 256000, True),
    "google/gemma-2-9b": ("gemma2", 3584, 42, 16, 8, 256, 14336, 256000, True),
    "google/gemma-2-27b": ("gemma2", 4608, 46, 32, 16, 128, 36864, 256000, True),
    "microsoft/Phi-3-mini-4k-instruct": ("phi3", 3072, 32, 32, 32, 96, 8192, 32064, False),
}
"""Hub id → family, width, layers, heads, key heads, width of a head, of the MLP, vocabulary, tied embeddings."""
GPT2 = {"gpt2": (768, 12, 12), "gpt2-medium": (1024, 24, 16), "gpt2-large": (1280, 36, 20), "gpt2-xl": (1600, 48, 25)}
"""Hub id → width, layers, heads."""
EXPERTS = {"mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2}}
"""What the config of a mixture says of its experts, by its family."""
TUNED = {
    "meta-llama/Llama-3.1-8B": "meta-llama/Meta-Llama-3-8B",
    "meta-llama/Meta-Llama-3.1-8B": "meta-llama/Meta-Llama-3-8B",
    "meta-llama/Llama-3.1-70B": "meta-llama/Meta-Llama-3-70B",
    "meta-llama/Llama-3.3-70B": "meta-llama/Meta-Llama-3-70B",
    "NousResearch/Llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "mistralai/Mistral-7B-v0.2": "mistralai/Mistral-7B-v0.1",
    "mistralai/Mixtral-8x7B": "mistralai/Mixtral-8x7B-v0.1",
}
"""Names of models that have the sizes of another."""
ENDINGS = ("-chat-hf", "-Instruct", "-it", "-chat", "-hf", "-Base")
"""What the ids of tuned models end with, which have their base's sizes."""


def config(hub_id: str) -> dict[str, Any] | None:
    """What config.json says of the sizes of a base of that hub id; None where it is not among those known."""
    for name in _names(hub_id):
        name = TUNED.get(name, name)
        if name in LIKE_LLAMA:
            sizes = dict(zip(COLUMNS, LIKE_LLAMA[name], strict=True))
            return {**sizes, **EXPERTS.get(str(sizes["model_type"]), {}), "dtype": "bfloat16"}
        if (bare := name.removeprefix("openai-community/")) in GPT2:
            width, layers, heads = GPT2[bare]
            sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "vocab_size": 50257}
            return {"model_type": "gpt2", **sizes, "dtype": "float32"}
    return None


def _names(hub_id: str) -> list[str]:
    """The id, and those of the bases that it may be a tuned form of."""
    bare = next((hub_id.removesuffix(ending) for ending in ENDINGS if hub_id.endswith(ending)), hub_id)
    return [hub_id, bare, f"{bare}-hf", bare.replace("-Instruct", "")]
