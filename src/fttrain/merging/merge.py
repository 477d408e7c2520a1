"""Folding an adapter into its base, one output shard in memory at a time, and proving that the result is the model.

`ftlaunch merge` merges outside a run, by fttrain.tools.merge.
"""

import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ftlaunch.errors import UserError
from ftlaunch.recipe.model import Model
from ftlaunch.recipe.names import has_form_of_id, is_local
from ftlaunch.recipe.stages import Merge
from ftlaunch.run.files import require_empty, sync, write_json
from ftlaunch.run.layout import REWARD_HEAD, RunDir
from ftlaunch.run.records import Divergence, MergeResult
from ftlaunch.safety.model_files import INDEX, WEIGHTS
from fttrain import artifact
from fttrain.merging import deltas, verify, weight_map
from fttrain.merging.deltas import Delta, Fitted
from fttrain.merging.weight_map import Group, Read, Stored, WeightMap
from fttrain.model import classifier
from fttrain.model.scorer import DTYPES
from fttrain.noise import replace_activations
from fttrain.quant import qat
from fttrain.quant.qat import Rounding
from fttrain.quant.weights import by_bitsandbytes


@dataclass(frozen=True)
class Source:
    """The two inputs of a merge: an adapter folder and the base that it was trained on."""

    base: Model
    adapter: Path

    @property
    def head(self) -> Path | None:
        """The file of a reward model's head, next to its adapter; None for a language model."""
        path = self.adapter / REWARD_HEAD
        return path if path.exists() else None


@dataclass(frozen=True)
class Rounded:
    """The weights that training rounded, and how."""

    quantized: dict[str, str]
    """Formats of weights that the base held in few bits, by name: rounded before the adapter is added."""
    in_training: dict[str, tuple[Rounding, Tensor | None]]
    """Weights that were trained through rounding, by name, with their steps: rounded after the adapter is added."""

    def finished(self, name: str, delta: Delta | None, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a weight of the merged model, rounded once as training saw it."""
        rounding = self.in_training.get(name)
        if rounding is None and name in self.quantized:
            weight = by_bitsandbytes(weight, self.quantized[name])
        if rounding is None:
            return weight.to(dtype) if delta is None else delta.on(weight, dtype)
        summed = weight.float() if delta is None else delta.on(weight, torch.float32, as_trained=True)
        return rounding[0].stored(summed, rounding[1]).to(dtype)

    @property
    def names(self) -> set[str]:
        """Names of all weights that rounding changes, adapted or not."""
        return {*self.quantized, *self.in_training}


@dataclass(frozen=True)
class Output:
    """The tensors to write in the place of each tensor of the base."""

    changes: Fitted
    rounded: Rounded
    dtype: torch.dtype | None
    """Format of floats; None for the base's own."""
    pending: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of groups that were folded at the first of their keys, until their own turn comes."""

    def tensors(self, one: Stored, read: Read) -> dict[str, Tensor]:
        """Return the tensors to write for one tensor of the base: itself, changed or not, and a head that is untied."""
        group = self.changes.map.by_key.get(one.key)
        if group is None or not self._changes(group):
            tensor = read(one.key)
            return {one.key: tensor.to(self.dtype) if self.dtype and one.is_float else tensor}
        # One conversion may take many tensors, such as all experts of a layer. The first of them folds the whole
        # group; the others then find theirs in `pending`, and what is left over is the new head.
        new: dict[str, Tensor] = {}
        if one.key not in self.pending:
            folded = self.changes.fold(group, read, self._finish)
            self.pending.update((key, folded.pop(key)) for key in group.keys)
            new = folded
        return {one.key: self.pending.pop(one.key)} | new

    def _changes(self, group: Group) -> bool:
        names = self.changes.map.names(group)
        tied = self.changes.tied
        return any(name in self.changes.of or name in self.rounded.names or (tied and name in tied) for name in names)

    def _finish(self, name: str, delta: Delta | None, weight: Tensor) -> Tensor:
        return self.rounded.finished(name, delta, weight, self.dtype or weight.dtype)


def find_source(path: Path) -> Source:
    """Return the adapter of a run's newest training stage, of an artifact folder, or of a plain PEFT folder.

    Raises UserError where there is none, or where its base is no longer in the folder that it names.
    """
    if (path / "plan.json").exists():
        trained = [
            stage_dir.artifact
            for stage_dir in RunDir(path).stage_dirs()
            if (stage_dir.artifact / artifact.CARD).exists()
        ]
        if not trained:
            raise UserError(f"no stage of {path} has left an artifact yet", "finish it: `ftlaunch resume`")
        path = trained[-1]
    if (path / artifact.CARD).exists():
        base, adapter = artifact.read(path)
        if adapter is None:
            raise UserError(f"{path} holds a whole model: there is no adapter to merge", "use the folder as it is")
    elif not (path / "adapter_config.json").exists():
        raise UserError(f"{path} is neither a run, nor an artifact, nor a PEFT adapter", "name one of these")
    else:
        base = _base_of_peft(path / "adapter_config.json")
    if is_local(base.path) and not Path(base.path).is_dir():
        file = artifact.CARD if (path / artifact.CARD).exists() else "adapter_config.json"
        message = f"the base of the adapter in {path} is not in {base.path}"
        raise UserError(message, f"move it back there, or write its new absolute path into {path / file}")
    return Source(base, path)


def _base_of_peft(file: Path) -> Model:
    """Return the base that a plain PEFT adapter names. Raises UserError where that says not where it is.

    PEFT writes a relative path as it was given; it counted from wherever the adapter was trained.
    """
    config = json.loads(file.read_text())
    name = config.get("base_model_name_or_path") or ""
    if not (is_local(name) or has_form_of_id(name)):
        message = f'base_model_name_or_path in {file} is "{name}", which does not say where the base is'
        raise UserError(message, "write the base's absolute path there, or its hub id")
    return Model(path=name, revision=config.get("revision"))


def merge(
    source: Source, out: Path, spec: Merge, allow: Callable[[str], str] = "merge.max_kl = {}".format
) -> MergeResult:
    """Write the merged model to `out`, read it back, and compare it with the adapter model.

    From a quantized base both methods are tried and the closer one is kept. Raises UserError if the disk is too small,
    the adapter does not fit the base, or the merged model differs by more than rounding explains; the remedy then has
    the command that `allow` returns for another `max_kl`. `out` appears only if all went well.
    """
    require_empty(out)
    folder = weight_map.folder_of(source.base)
    stored = list(weight_map.stored(folder))
    config = json.loads((folder / "config.json").read_text())
    replace_activations.write_into(config, replace_activations.read(source.adapter))
    reference = verify.reference(source.base, source.adapter, source.head)
    changes = deltas.fitted(reference.added, WeightMap(reference.skeleton, [one.key for one in stored]))
    changes.rehearse({one.key: one for one in stored})
    if source.head is not None:
        stored = [one for one in stored if one.key not in changes.head_keys]
    # An adapter trained on NF4 weights has learned to make up for their rounding. Which is closer to the adapter model
    # on 16-bit weights, adding it to the original weights or to the rounded ones, is measured, not assumed.
    methods = ["base", "dequantized"] if source.base.is_quantized else ["base"]
    tried: dict[str, Divergence] = {}
    for method in methods:
        temporary = _temporary(out, method)
        quantized = reference.quantized if method == "dequantized" else {}
        output = Output(changes, Rounded(quantized, reference.rounding), DTYPES[spec.dtype] if spec.dtype else None)
        _write(folder, dict(config), stored, output, source, temporary, spec)
        tried[method] = verify.compare(reference, temporary)
    best = min(tried, key=lambda method: tried[method].kl)
    limit = spec.max_kl if spec.max_kl is not None else verify.tolerance(source.base, _formats(stored, spec))
    if flaw := verify.flaw(tried[best], limit, was_set=spec.max_kl is not None):
        enough = f"{1.2 * tried[best].kl:.2g}"
        raise UserError(
            f"the merged model differs from the adapter model: {tried[best]}; {flaw}",
            f"the training is whole, its artifact works as it is: ftlaunch chat {shlex.quote(str(source.adapter))}; "
            f"the merged model is in {_temporary(out, best)}; to accept it: {allow(enough)}",
        )
    # The merged model takes its name only now that it has been read back; the other candidate goes afterwards.
    _temporary(out, best).replace(out)
    for method in methods:
        shutil.rmtree(_temporary(out, method), ignore_errors=True)
    sync(out.parent)
    return MergeResult(method=best, tried=tried, **msgspec.structs.asdict(tried[best]))


def _formats(stored: list[Stored], spec: Merge) -> set[str]:
    """Return the number formats of the merged model's weights on disk, in safetensors' names."""
    return {verify.WORDS[spec.dtype]} if spec.dtype else {one.format for one in stored if "F" in one.format}


def _temporary(out: Path, method: str) -> Path:
    return out.with_name(f".{out.name}.{method}")


def _write(
    folder: Path, config: dict[str, Any], stored: list[Stored], output: Output, source: Source, out: Path, spec: Merge
) -> None:
    """Write the merged weights, config, generation config and tokenizer to `out`."""
    # Room is checked first: a disk that fills up after an hour of writing would leave nothing.
    needed = sum(one.num_bytes(output.dtype) for one in stored)
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise UserError(f"{out.parent} has {free:,} bytes free and the model needs {needed:,}", "make room")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(mode=0o700)
    _write_weights(stored, output, out, spec.max_shard_bytes)
    _write_config(config, output, out, spec, in_few_bits=not all(one.is_float for one in stored))
    settings = (place / artifact.GENERATION_CONFIG for place in (source.adapter, folder))
    if held := next(filter(Path.exists, settings), None):
        shutil.copyfile(held, out / held.name)
    tokenizer = _tokenizer(source)
    tokenizer.save_pretrained(out)
    if source.base.rounding:
        qat.leave_card(out, source.base.rounding)
    if source.head is not None:
        shutil.copyfile(source.head, out / REWARD_HEAD)
        classifier.make(out, tokenizer)


def _write_weights(stored: list[Stored], output: Output, out: Path, max_bytes: int) -> None:
    shards = list(_split(stored, output.dtype, max_bytes))
    files = {one.key: one.file for one in stored}
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for one in shard:
            tensors |= output.tensors(one, lambda key: _read(files[key], key))
        # An untied head may be written with the embedding although the base has a copy of it in a later shard.
        tensors = {key: tensor for key, tensor in tensors.items() if key not in places}
        save_file(tensors, out / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        total = sum(one.num_bytes(output.dtype) for one in stored)
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _read(file: Path, key: str) -> Tensor:
    with safe_open(file, "pt") as shard:
        return shard.get_tensor(key)


def _split(stored: list[Stored], dtype: torch.dtype | None, max_bytes: int) -> Iterator[list[Stored]]:
    """Yield tensors in order, in shards of at most `max_bytes`; a single larger tensor is a shard of its own."""
    shard: list[Stored] = []
    size = 0
    for one in stored:
        if shard and size + one.num_bytes(dtype) > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(one)
        size += one.num_bytes(dtype)
    yield shard


def _write_config(config: dict[str, Any], output: Output, out: Path, spec: Merge, *, in_few_bits: bool) -> None:
    if not in_few_bits:
        config.pop("quantization_config", None)
    if spec.dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = str(DTYPES[spec.dtype]).removeprefix("torch.")
    if output.changes.tied:
        for table in (config, config.get("text_config", {})):
            table["tie_word_embeddings"] = False
    write_json(out / "config.json", config)


def _tokenizer(source: Source) -> Any:
    """Return the adapter's own tokenizer, else the base's."""
    if (source.adapter / "tokenizer_config.json").exists():
        return artifact.load_tokenizer(str(source.adapter))
    return artifact.load_tokenizer(source.base.path, source.base.revision)
