"""The artifact that a stage hands to the next: an adapter or a whole model, its tokenizer, and their origin."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import save_file
from torch import Tensor

from ftlaunch.errors import UserError
from ftlaunch.recipe.adapter import Full
from ftlaunch.recipe.model import Model
from ftlaunch.recipe.names import holds
from ftlaunch.recipe.noise import Noise, NoNoise, Saturated, replaces
from ftlaunch.run.files import folder_by_rename, write_json
from ftlaunch.run.layout import CARD, REWARD_HEAD, StageDir
from ftlaunch.run.spec import StageSpec
from fttrain import adapters
from fttrain.data.templates import end_tokens, plain_template
from fttrain.engine import Engine
from fttrain.model import classifier, scorer
from fttrain.model.scorer import DTYPES
from fttrain.noise import replace_activations
from fttrain.quant import qat

GENERATION_CONFIG = "generation_config.json"
VALUE_HEAD = "value_head."
"""Prefix of the weights of PPO's value head. It predicts one policy's rewards, and no later stage needs it."""


@dataclass(frozen=True)
class StartPoint:
    """The base, adapter and tokenizer that a stage starts from."""

    base: Model
    adapter: Path | None
    """Folder of the adapter that is trained further; None for a new one."""
    tokenizer: str
    """Folder or hub id of the tokenizer: the base's, or the previous stage's."""
    head: Path | None = None
    """File of the reward model's head that is trained further; None for a new one."""
    replaced: tuple[Noise, ...] = ()
    """The [noise] tables that have replaced the base's activation functions, in order."""


def has_adapter(spec: StageSpec) -> bool:
    """Return whether the stage trains an adapter rather than all weights."""
    return not isinstance(spec.adapter, Full)


def origin(spec: StageSpec, folder: StageDir) -> StartPoint:
    """Return the base and adapter that a stage starts from: the recipe's, or the previous stage's artifact."""
    if spec.start is None:
        return StartPoint(spec.model, None, spec.model.path)
    start = folder.path.parent / spec.start
    base, adapter = read(start)
    head = start / REWARD_HEAD if (start / REWARD_HEAD).exists() else None
    if adapter is None:
        whole = msgspec.structs.replace(spec.model, path=str(start), revision=None)
        return StartPoint(whole, None, str(start), head, replace_activations.read(start))
    model = msgspec.structs.replace(spec.model, path=base.path, revision=base.revision)
    return StartPoint(model, adapter, str(start), head, replace_activations.read(start))


def read(folder: Path) -> tuple[Model, Path | None]:
    """Return the base of an artifact, and the folder of its adapter if it is one; a merged model is a base itself."""
    if not (folder / CARD).exists() and (folder / "config.json").exists():
        return Model(path=str(folder)), None
    try:
        card = json.loads((folder / CARD).read_text())
    except FileNotFoundError as error:
        remedy = "name a run or its artifact folder"
        raise UserError(f"{folder} is not an artifact: it has no {CARD}", remedy) from error
    return msgspec.convert(card["base"], Model), folder if card["adapter"] else None


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """Return the tokenizer of a finished model. Its chat template is the one that the model was trained with."""
    tokenizer = scorer.load_tokenizer(path, revision)
    # Artifacts used to keep the base's template, with the card alone to say that it was not trained with.
    if holds(path, CARD) and json.loads((Path(path) / CARD).read_text()).get("rendering") == "none":
        tokenizer.chat_template = plain_template(tokenizer)
    return tokenizer


def replaced_activations(spec: StageSpec, origin: StartPoint) -> tuple[Noise, ...]:
    """Return the [noise] tables in force in a stage: those of its start, and its own if that replaces functions."""
    noise = spec.noise
    own = noise if isinstance(noise, Saturated) else NoNoise(sites=noise.sites, activation=noise.activation)
    return (*origin.replaced, own) if replaces(own) and own not in origin.replaced[-1:] else origin.replaced


def trained_weights(engine: Engine) -> dict[str, Tensor]:
    """Return an artifact's weights, whole and in fp32: on the CPU of rank 0, empty elsewhere. Collective."""
    return {name: tensor for name, tensor in engine.full_tensors() if not name.startswith(VALUE_HEAD)}


def save(spec: StageSpec, source: StartPoint, engine: Engine, tokenizer: Any, folder: Path) -> None:
    """Gather the trained weights and write them, with the tokenizer, as plain transformers or PEFT loads them.

    A reward model's head gets a file of its own; if all weights were trained, the folder is a sequence classifier as
    well. A value head is not saved. Collective. The folder appears by rename, on rank 0.
    """
    weights = trained_weights(engine)
    if engine.world.is_main:
        empty = [name for name, tensor in weights.items() if tensor.numel() == 0]
        assert not empty, f"weights were not gathered: {empty}"
        base = source.base if has_adapter(spec) else msgspec.structs.replace(source.base, path=str(folder))
        adapter = spec.adapter if has_adapter(spec) else None
        card = {"format": 1, "base": base, "adapter": adapter, "activations": replaced_activations(spec, source)}
        card["rendering"] = "none" if _is_untemplated(spec) else "template"
        with folder_by_rename(folder) as partial:
            _write(spec, source.base.revision, engine, weights, tokenizer, partial)
            write_json(partial / CARD, card)
            shutil.rmtree(folder, ignore_errors=True)
    engine.world.barrier()


def _is_untemplated(spec: StageSpec) -> bool:
    """Return whether none of a stage's data sets uses a chat template."""
    return all(data.template == "none" for data in spec.data.values())


def _write(
    spec: StageSpec, revision: str | None, engine: Engine, weights: dict[str, Tensor], tokenizer: Any, folder: Path
) -> None:
    model: Any = engine.scorer.model
    head = {name: weights.pop(name) for name in list(weights) if name.startswith("score.")}
    steps = qat.take_steps(weights)
    if has_adapter(spec):
        model.peft_config[adapters.TRAINED].revision = revision  # else plain peft would take the base's newest
        adapters.save(model, spec.adapter, weights, folder)
    else:
        dtype = DTYPES[spec.model.dtype]
        # A model that was trained through rounding is saved rounded: what was evaluated is what users load.
        for name, (rounding, _) in qat.roundings(model).items():
            weights[name] = rounding.stored(weights[name], steps.get(name))
        model.config.dtype = dtype
        held = {name: tensor.to(dtype) for name, tensor in weights.items()}
        model.save_pretrained(folder, state_dict=_buffers(model) | held)
        if spec.model.rounding:
            qat.leave_card(folder, spec.model.rounding)
    tokenizer.save_pretrained(folder)
    if not head:
        _write_generation_config(spec, engine, tokenizer, folder)
    if steps and has_adapter(spec):
        save_file(steps, folder / qat.STEPS_FILE, metadata={"format": "pt"})
    if head:
        save_file(head, folder / REWARD_HEAD, metadata={"format": "pt"})
        if not has_adapter(spec):
            classifier.make(folder, tokenizer)


def _write_generation_config(spec: StageSpec, engine: Engine, tokenizer: Any, folder: Path) -> None:
    """Write the base's generation config, with the tokens that end answers in training added to those that end it."""
    config: dict[str, Any] = engine.scorer.causal.generation_config.to_diff_dict()
    template = None if _is_untemplated(spec) else tokenizer.chat_template
    known = config.get("eos_token_id")
    ends = {*(known if isinstance(known, list) else [] if known is None else [known])}
    ends |= end_tokens(tokenizer, template)
    if ends:
        config["eos_token_id"] = sorted(ends) if len(ends) > 1 else ends.pop()
    write_json(folder / GENERATION_CONFIG, config)


def _buffers(model: Any) -> dict[str, Tensor]:
    """Return a model's buffers that are saved, such as the bias of DeepSeek's router: they are no parameters."""
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor.cpu() for name, tensor in model.state_dict().items() if name not in weights}
