"""What a model folder may hold: weights in safetensors, and no wish for code. Reads its JSON files and nothing else.

What is refused are ways to run code that comes with a model although `trust_remote_code` is off:

- `auto_map` names Python files of the folder;
- keys that end in `_internal` set what a library keeps to itself, such as a kernel to fetch and run (CVE-2026-4372);
- `trust_remote_code` in a file turns on for a nested model what the user left off (CVE-2026-5241);
- an attention or experts implementation with a slash is a kernel of the hub, which is compiled code;
- `megatron_config` and a foreign `auto_mapping` of an adapter name modules that PEFT imports;
- pickled weights are programs (CVE-2025-32434 and CVE-2026-24747 are ways around `weights_only`).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from ftlaunch.errors import UserError

Json: TypeAlias = str | int | float | bool | list["Json"] | dict[str, "Json"] | None

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
TRAINED_THROUGH = {"bitsandbytes", "mxfp4"}
"""Formats of stored weights that training goes through: gpt-oss's are made 16 bits wide when they are loaded."""
VOCABULARIES = {"tokenizer.json", "vocab.json", "added_tokens.json"}
"""Their keys are words of the model's language, which may be any."""

IMPLEMENTATIONS = {
    *("attn_implementation", "_attn_implementation"),
    *("experts_implementation", "_experts_implementation"),
}
UNPICKLED = (
    "use a revision with safetensors; or, for a hub id whose author you trust, "
    "write model.revision = a full commit and model.allow_pickle = true"
)

ENCODERS = {
    *(
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "megatron-bert",
        "rembert",
    ),
    *("roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
"""Families that read from left to right only where their config says so."""
PEFT_IMPORTS = ("transformers.", "peft.")


def require_plain(folder: Path, *, allow_pickle: bool = False) -> None:
    """Raise UserError for the first thing in a model's or adapter's folder that is more than data.

    `allow_pickle` lets pickled weights pass; nothing lets code pass.
    """
    for path in sorted(folder.glob("*.json")):
        if path.name not in VOCABULARIES:
            _require_no_code(path)
    _require_names_inside(folder)
    if not allow_pickle:
        _require_no_pickle(folder)


def require_weights_to_train(folder: Path) -> None:
    """Raise UserError unless a model can be trained over its weights as they are stored."""
    config = _read(folder / "config.json")
    if isinstance(config, dict) and (why := _reads_both_ways(config)):
        raise UserError(
            f"{folder} holds a model that cannot be trained to go on with a text: config.json says {why}",
            "use a base that reads from left to right, such as llama, qwen3, mistral or gemma3",
        )
    stored = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(stored, dict) or (method := stored.get("quant_method")) in TRAINED_THROUGH:
        return
    raise UserError(
        f"{folder} holds its weights in few bits ({method}), which nothing can be trained over or merged into",
        "name the model that it was made from, with weights in 16 bits; model.quantization makes few bits of those",
    )


def _reads_both_ways(config: dict[str, Json]) -> str | None:
    """Return the entry of a config by which tokens see those after them; None where there is none."""
    text = config.get("text_config")
    if config.get("model_type") in ENCODERS and config.get("is_decoder") is not True:
        return "it is an encoder (is_decoder is not true)"
    for table in (config, text if isinstance(text, dict) else {}):
        if table.get("is_encoder_decoder") is True:
            return "is_encoder_decoder"
        # Of Gemma 4's words, "vision" is about images alone.
        if table.get("use_bidirectional_attention") in (True, "all"):
            return "use_bidirectional_attention"
    return None


def has_safetensors(folder: Path) -> bool:
    """Return whether a folder has weights in safetensors, in one file or in shards with an index."""
    return (folder / WEIGHTS).exists() or (folder / INDEX).exists()


def shard_names(folder: Path) -> list[str]:
    """The weight files that a folder's index names, or the only one there is; [] where it has none in safetensors."""
    if (folder / INDEX).exists():
        index = _read(folder / INDEX)
        named = index.get("weight_map") if isinstance(index, dict) else None
        # weight_map is tensor → file, so most files are named many times.
        return sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []
    return [WEIGHTS] if (folder / WEIGHTS).exists() else []


def _require_no_code(path: Path) -> None:
    for key, why in _demands(_read(path)):
        raise UserError(
            f"{path} has the key {key!r}, {why}",
            "use a model that needs no code of its own; where a model merely offers code and its architecture is part"
            " of transformers, copy its folder and take the key out",
        )


def _read(path: Path) -> Json:
    """A JSON file's content; None where it is none, which whoever needs the file will say better."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _demands(value: Json) -> Iterator[tuple[str, str]]:
    """Each key, at any depth, that asks for code, and what it would do."""
    if isinstance(value, list):
        for element in value:
            yield from _demands(element)
    if not isinstance(value, dict):
        return
    for key, inner in value.items():
        if why := _demand(key, inner):
            yield key, why
        yield from _demands(inner)


def _demand(key: str, value: Json) -> str | None:
    # `"auto_map": {}` and `"trust_remote_code": false` ask for nothing.
    if not value:
        return None
    if key == "auto_map":
        return "which loads Python code that comes with the model"
    if key.endswith("_internal"):
        return "which sets a library's internals and can make it fetch code (CVE-2026-4372)"
    if key == "trust_remote_code":
        return "which would let a model that it names run code (CVE-2026-5241)"
    # "sdpa" is built in; "kernels-community/flash-attn" would be fetched and run.
    if key in IMPLEMENTATIONS and any("/" in name for name in _texts(value)):
        return "which loads a compiled kernel from the hub"
    if key == "megatron_config" or (key == "auto_mapping" and not _is_known_library(value)):
        return "which has PEFT import a module that the file chooses"
    return None


def _texts(value: Json) -> list[str]:
    # A model of several parts may have one for each: {"text_config": "sdpa", "vision_config": "eager"}.
    return [text for text in (value.values() if isinstance(value, dict) else [value]) if isinstance(text, str)]


def _is_known_library(mapping: Json) -> bool:
    named = mapping.get("parent_library") if isinstance(mapping, dict) else None
    # With a dot at the end, as "peft_other.module" begins with "peft", too.
    return named is None or f"{named}.".startswith(PEFT_IMPORTS)


def _require_names_inside(folder: Path) -> None:
    """An index may name files of its own folder and no others."""
    for name in shard_names(folder):
        # "../other/x.safetensors" and absolute paths lead to files that nobody has checked.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                f"{folder / INDEX} names {name!r}, which is no safetensors file of its folder",
                "download the model again",
            )


def _require_no_pickle(folder: Path) -> None:
    # An adapter's folder may hold a model.safetensors as well, which would not make a pickled adapter safe.
    is_adapter = (folder / ADAPTER_CONFIG).exists()
    if (folder / ADAPTER_WEIGHTS).exists() if is_adapter else has_safetensors(folder):
        return
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickled:
        raise UserError(f"{folder} has no safetensors, and loading the pickled {pickled[0]} can run code", UNPICKLED)
