"""Where scores come from: a Python function of prompt, answer and row, or a model that reads both."""

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from ftlaunch.errors import UserError
from ftlaunch.recipe.model import Model
from ftlaunch.recipe.names import holds
from ftlaunch.recipe.noise import Noise
from ftlaunch.rows.template import Row, text_at
from ftlaunch.run.layout import REWARD_HEAD
from fttrain import adapters, artifact, hub
from fttrain.data.prompts import Prompt
from fttrain.engine import Engine
from fttrain.evaluation.words import last_number
from fttrain.model import completeness
from fttrain.model.scorer import RewardHead
from fttrain.noise import replace_activations
from fttrain.ppo.actor import REWARD_MODEL, ActorCritic
from fttrain.ppo.experience import split_rows

Function = Callable[[str, str, Row], float]
"""(the prompt's last turn, the answer's text, the row) → score."""


@dataclass(frozen=True)
class ScoredResponse:
    """An answer to be scored."""

    prompt: Prompt
    text: str
    """The text without special tokens."""


Reward = Callable[[Engine, Sequence[ScoredResponse]], Tensor]
"""What scores answers: it returns [B], in fp32, the same on every rank. Collective."""


class FunctionReward:
    """Scores by a Python function; each rank calls it for its share of the answers."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._function = SHIPPED.get(name) or _load(name)

    def __call__(self, engine: Engine, said: Sequence[ScoredResponse]) -> Tensor:
        world = engine.world
        mine = {index: self._score(said[index]) for index in range(world.rank, len(said), world.size)}
        return torch.tensor(world.collect(mine, len(said)))

    def _score(self, one: ScoredResponse) -> float:
        score = self._function(one.prompt.text, one.text, one.prompt.row)
        if isinstance(score, int | float) and math.isfinite(score):
            return float(score)
        message = f"reward_function {self._name} returned {score!r} for the answer to {one.prompt.where}"
        raise UserError(message, "let it return a finite number")


class ModelReward:
    """Scores by the actor's reward model, which reads prompt and answer in its own chat template."""

    def __init__(self, tokenizer: Any, *, micro_batch_size: int) -> None:
        self._tokenizer = tokenizer
        self._micro_batch_size = micro_batch_size

    def __call__(self, engine: Engine, said: Sequence[ScoredResponse]) -> Tensor:
        world, actor = engine.world, engine.scorer
        assert isinstance(actor, ActorCritic)
        mine: dict[int, float] = {}
        with engine.evaluating(), actor.using_adapter(REWARD_MODEL):
            rows = [(ids_T, np.zeros(len(ids_T), dtype=bool)) for ids_T in map(self._ids, said)]
            rounds = -(-len(said) // (self._micro_batch_size * world.size))
            is_packed = engine.layout.packing and isinstance(actor.reward_model, RewardHead)
            for micro in split_rows(rows, engine, rounds, packing=is_packed):  # a classifier knows no packed rows
                mine |= dict(zip(micro.rows, engine.forward(micro).tolist(), strict=True))
        return torch.tensor(world.collect(mine, len(said)))

    def _ids(self, one: ScoredResponse) -> np.ndarray:
        """Return the whole conversation as token ids, int32, rendered as in the reward model's training."""
        turns = [*one.prompt.turns, {"role": "assistant", "content": one.text}]
        if self._tokenizer.chat_template:
            fields = one.prompt.conversation.fields
            tools = {key: fields[key] for key in ("tools", "documents") if key in fields}
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, **tools)
            return np.array(self._tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int32)
        # A classifier without a template, such as a BERT, takes a pair of texts with its own separator.
        prompt = "\n\n".join(turn["content"] for turn in one.prompt.turns)
        return np.array(self._tokenizer(prompt, one.text).input_ids, dtype=np.int32)


def load_reward_model(
    model: Model, policy: nn.Module, base: Model, replaced: Sequence[Noise], *, dtype: torch.dtype, in_fp32: bool
) -> nn.Module:
    """Return the frozen reward model that a folder or hub id holds; of `model`, path and revision alone count.

    An adapter of the policy's own base is added to the policy's model as a second adapter, and only its head is
    returned; anything else is a model of its own. Raises UserError where it cannot be loaded or gives no single score.
    """
    place = model.path
    folder = Path(place)
    if not holds(place, REWARD_HEAD) or artifact.read(folder)[1] is None:
        return _load_classifier(place, model.revision, dtype)
    theirs, _ = artifact.read(folder)
    if (theirs.path, theirs.revision) != (base.path, base.revision) or not isinstance(policy, PeftModel):
        message = (
            f"the reward model {place} is an adapter of {theirs.path}, which is not what the policy's adapter is on"
        )
        raise UserError(message, "merge the reward model first (`ftlaunch merge`) and name the merged one")
    if replace_activations.read(folder) != tuple(replaced):
        message = f"the reward model {place} was trained with other activation functions than the policy has"
        raise UserError(message, "merge the reward model first (`ftlaunch merge`) and name the merged one")
    adapters.add_frozen(policy, folder, REWARD_MODEL, in_fp32=in_fp32)
    weight = load_file(folder / REWARD_HEAD)["score.weight"]
    head = RewardHead(weight.shape[1])
    with torch.no_grad():
        head.weight.copy_(weight)
    return head.requires_grad_(False)


def _load_classifier(place: str, revision: str | None, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            hub.model_folder(place, revision),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        message = f"no sequence classifier could be loaded from {place}: {str(error).splitlines()[0]}"
        raise UserError(message, "name a folder or hub id of a sequence classifier with one label") from error
    if model.config.num_labels != 1:
        message = f"the model in {place} gives {model.config.num_labels} numbers for an answer, and a score is one"
        raise UserError(message, "name a sequence classifier with one label")
    completeness.require(place, model, found, has_other_head=True)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0  # rows are padded with it
    return model.requires_grad_(False)


def gsm8k(prompt: str, answer: str, row: Row) -> float:  # noqa: ARG001 every reward's
    """Return 1.0 where the answer's last number equals the last one of the row's field "answer", else 0.0."""
    wanted, given = last_number(text_at(row, ("answer",), "reward gsm8k")), last_number(answer)
    return float(given is not None and given == wanted)


SHIPPED: dict[str, Function] = {"gsm8k": gsm8k}


def _load(name: str) -> Function:
    """Return the function that "FILE.py:NAME" or "package.module:NAME" names."""
    place, _, function = name.rpartition(":")
    remedy = "correct reward_function; `ftlaunch validate` looks for the function as well"
    try:
        module = _module_of(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        return getattr(module, function)
    except (ImportError, OSError, AttributeError) as error:
        raise UserError(f"reward_function {name} cannot be loaded: {error}", remedy) from error


def _module_of(path: Path) -> object:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
