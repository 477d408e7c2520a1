"""Folding an adapter into its base, one output shard in memory at a time, and proving that the result is the model.

`ftlaunch merge` does it outside a run, by fttrain.tools.merge.
"""

import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ftlaunch.errors import UserError
from ftlaunch.recipe import Merge, Model
from ftlaunch.run.files import sync_folder, write_json
from ftlaunch.run.layout import REWARD_HEAD, RunDir
from fttrain import artifact, hub
from fttrain.merging import deltas as weight_deltas
from fttrain.merging import verify
from fttrain.merging.deltas import Deltas
from fttrain.merging.verify import Likeness
from fttrain.model import classifier
from fttrain.model.scorer import DTYPES
from fttrain.noise import replace_activations
from fttrain.quant import qat
from fttrain.quant.qat import Rounding

WEIGHTS = "model.safetensors"


INDEX = "model.safetensors.index.json"


SIDE_FILES = ("generation_config.json",)


@dataclass(frozen=True)
class Source:
    """What is merged: an adapter folder and the base that it was trained on."""

    base: Model
    adapter: Path

    @property
    def head(self) -> Path | None:
        """The head of a reward model, beside its adapter."""
        path = self.adapter / REWARD_HEAD
        return path if path.exists() else None


@dataclass(frozen=True)
class Merged:
    """What came of it."""

    method: str
    """"base" adds the adapter to the base's own weights; "dequantized" to what the weights in few bits stand for."""
    likeness: Likeness
    tried: dict[str, Likeness]


@dataclass(frozen=True)
class Stored:
    """One tensor of the base on disk, and how large it will be in the merged model."""

    key: str
    file: Path
    num_bytes: int


@dataclass(frozen=True)
class Rounded:
    """Which weights training saw rounded, and how."""

    quantized: dict[str, str]
    """Formats of those that the base held in few bits, by their keys: rounded before the adapter is added."""
    in_training: dict[str, tuple[Rounding, Tensor | None]]
    """How those that were trained through rounding are rounded, after the adapter is added, and their steps."""

    def fold(self, deltas: Deltas, key: str, weight: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """What stands for `key` in the merged model, rounded once as training saw it."""
        named = (name for name in self.in_training if key in (name, name.partition(".")[2]))
        found = next(named, None)
        if found is None:
            return deltas.fold(key, weight, dtype, through=self.quantized.get(key))
        folded = deltas.fold(key, weight, torch.float32, through=None)
        rounding, log_step = self.in_training[found]
        target = dtype or weight.dtype
        return {name: rounding.stored(one, log_step).to(target).contiguous() for name, one in folded.items()}


def find_source(path: Path) -> Source:
    """The adapter in a run's newest training stage, an artifact folder, or a plain PEFT folder. Raises UserError."""
    if (path / "plan.json").exists():
        trained = [step.artifact for step in RunDir(path).step_dirs() if (step.artifact / artifact.CARD).exists()]
        if not trained:
            raise UserError(f"no stage of {path} has left an artifact yet", "finish it: `ftlaunch resume`")
        path = trained[-1]
    if (path / artifact.CARD).exists():
        base, adapter = artifact.read(path)
        if adapter is None:
            raise UserError(f"{path} holds a whole model: there is no adapter to merge", "use the folder as it is")
        return Source(base, adapter)
    if not (path / "adapter_config.json").exists():
        raise UserError(f"{path} is neither a run, nor an artifact, nor a PEFT adapter", "name one of these")
    config = json.loads((path / "adapter_config.json").read_text())
    return Source(Model(path=config["base_model_name_or_path"], revision=config.get("revision")), path)


def merge(source: Source, out: Path, spec: Merge, allow: Callable[[str], str] = "merge.max_kl = {}".format) -> Merged:
    """Write the merged model to `out`, read it back, and compare it with the adapter model.

    From a quantized base both ways of merging are tried and the closer one is kept. Raises UserError if the disk is
    too small, the adapter does not fit the base, or the merged model differs by more than rounding explains, with the
    command that `allow` tells for going on with another `max_kl`; `out` appears only if all went well.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not empty", "name another folder, or remove it")
    folder = _base_folder(source.base)
    deltas = Deltas.read(source.adapter)
    config = json.loads((folder / "config.json").read_text())
    replace_activations.write_into(config, replace_activations.read(source.adapter))
    reference = verify.reference(source.base, source.adapter, source.head)
    methods = ["base", "dequantized"] if source.base.held_in_few_bits else ["base"]
    tried: dict[str, Likeness] = {}
    for method in methods:
        aside = _aside(out, method)
        quantized = reference.quantized if method == "dequantized" else {}
        _write(folder, dict(config), deltas, source, aside, spec, Rounded(quantized, reference.rounding))
        tried[method] = verify.compare(reference, aside)
    best = min(tried, key=lambda method: tried[method].kl)
    limit = spec.max_kl if spec.max_kl is not None else verify.tolerance(source.base, _formats(folder, spec))
    if flaw := verify.flaw(tried[best], limit, was_set=spec.max_kl is not None):
        enough = f"{1.2 * tried[best].kl:.2g}"
        raise UserError(
            f"the merged model differs from the adapter model: {tried[best]}; {flaw}",
            f"the training is whole, its artifact works as it is: ftlaunch chat {shlex.quote(str(source.adapter))}; "
            f"the merged model is in {_aside(out, best)}; to accept it: {allow(enough)}",
        )
    _aside(out, best).replace(out)
    for method in methods:
        shutil.rmtree(_aside(out, method), ignore_errors=True)
    sync_folder(out.parent)
    return Merged(best, tried[best], tried)


def _formats(folder: Path, spec: Merge) -> set[str]:
    """Number formats of the merged model's weights on disk, in safetensors' words."""
    if spec.dtype:
        return {verify.WORDS[spec.dtype]}
    found: set[str] = set()
    for name in set(_shard_names(folder)):
        with safe_open(folder / name, "pt") as shard:
            found |= {shard.get_slice(key).get_dtype() for key in shard.keys()}  # noqa: SIM118 not a dict
    return {name for name in found if "F" in name}


def _aside(out: Path, method: str) -> Path:
    return out.with_name(f".{out.name}.{method}")


def _base_folder(base: Model) -> Path:
    """The base's files on disk, fetched from the hub if it is an id."""
    try:
        return hub.model_folder(base.path, base.revision)
    except (OSError, ValueError) as error:
        raise UserError(f"the base {base.path} cannot be had: {error}", "download it and give its folder") from error


def _write(
    folder: Path,
    config: dict[str, Any],
    deltas: Deltas,
    source: Source,
    out: Path,
    spec: Merge,
    rounded: Rounded,
) -> None:
    """The merged weights, config, generation config and tokenizer in `out`."""
    dtype = DTYPES[spec.dtype] if spec.dtype else None
    stored = [one for one in _stored(folder, dtype) if source.head is None or one.key != weight_deltas.HEAD]
    needed = sum(tensor.num_bytes for tensor in stored)
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise UserError(f"{out.parent} has {free:,} bytes free and the model needs {needed:,}", "make room")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(mode=0o700)
    deltas = deltas.fitted(tied=bool(config.get("tie_word_embeddings", False)), keys={one.key for one in stored})
    _write_weights(stored, deltas, out, dtype, spec.max_shard_bytes, rounded)
    _write_config(config, deltas, out, spec)
    for name in SIDE_FILES:
        if (folder / name).exists():
            shutil.copyfile(folder / name, out / name)
    tokenizer = _tokenizer(source)
    tokenizer.save_pretrained(out)
    if source.base.rounding:
        qat.leave_card(out, source.base.rounding)
    if source.head is not None:
        shutil.copyfile(source.head, out / REWARD_HEAD)
        classifier.make(out, tokenizer)


def _stored(folder: Path, dtype: torch.dtype | None) -> Iterator[Stored]:
    """Every tensor of the base, from the headers alone."""
    files = sorted({folder / name for name in _shard_names(folder)})
    for file in files:
        with safe_open(file, "pt") as shard:
            for key in shard.keys():  # noqa: SIM118 not a dict
                view = shard.get_slice(key)
                width = dtype.itemsize if dtype else _width(view.get_dtype())
                yield Stored(key, file, width * int(torch.Size(view.get_shape()).numel()))


def _shard_names(folder: Path) -> list[str]:
    if (folder / INDEX).exists():
        return list(json.loads((folder / INDEX).read_text())["weight_map"].values())
    if not (folder / WEIGHTS).exists():
        raise UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}", "convert the base to safetensors first")
    return [WEIGHTS]


def _width(name: str) -> int:
    """Bytes of one element of a safetensors dtype such as BF16 or F8_E4M3."""
    return int("".join(filter(str.isdigit, name.split("_")[0])) or 8) // 8


def _write_weights(
    stored: list[Stored],
    deltas: Deltas,
    out: Path,
    dtype: torch.dtype | None,
    max_bytes: int,
    rounded: Rounded,
) -> None:
    shards = list(_split(stored, max_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for one in shard:
            with safe_open(one.file, "pt") as file:
                tensors |= rounded.fold(deltas, one.key, file.get_tensor(one.key), dtype)
        save_file(tensors, out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        total = sum(one.num_bytes for one in stored)
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _split(stored: list[Stored], max_bytes: int) -> Iterator[list[Stored]]:
    """Tensors in order, in shards of at most `max_bytes`; a single larger tensor is a shard of its own."""
    shard: list[Stored] = []
    for one in stored:
        if shard and sum(other.num_bytes for other in shard) + one.num_bytes > max_bytes:
            yield shard
            shard = []
        shard.append(one)
    yield shard


def _write_config(config: dict[str, Any], deltas: Deltas, out: Path, spec: Merge) -> None:
    config.pop("quantization_config", None)
    if spec.dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = str(DTYPES[spec.dtype]).removeprefix("torch.")
    if deltas.unties:
        config["tie_word_embeddings"] = False
    write_json(out / "config.json", config)


def _tokenizer(source: Source) -> Any:
    """The adapter's own, else the base's."""
    from fttrain.model.scorer import load_tokenizer

    beside = (source.adapter / "tokenizer_config.json").exists()
    return load_tokenizer(str(source.adapter) if beside else source.base.path)


def as_result(merged: Merged) -> dict[str, Any]:
    """The comparison as plain values, for result.json."""
    return msgspec.to_builtins(
        {
            "method": merged.method,
            **asdict(merged.likeness),
            "tried": {method: asdict(one) for method, one in merged.tried.items()},
        }
    )
