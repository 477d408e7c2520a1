"""Checks before a stage's first step: how much of the model the adapter is on, and whether it can be merged."""

from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from ftlaunch.errors import UserError
from ftlaunch.recipe.adapter import Adapter, LowRank
from ftlaunch.recipe.model import Model, dropout_in
from ftlaunch.recipe.stages import Pairwise, Sft, Training
from ftlaunch.run.spec import StageSpec
from fttrain.adapters import coverage, targets
from fttrain.distributed.world import World
from fttrain.merging import dry_run
from fttrain.model import dropout
from fttrain.model.halves import Halves


def of_base(model: Any, adapter: Adapter | None, spec: Model, world: World) -> None:
    """Print how much of the model a new adapter is on, and how much is in few bits.

    Raises UserError if that is too little, or if layers are normed by the batch: results would depend on the layout,
    and running means are in no adapter.
    """
    _, body = targets.body_of(model)
    normed = next((name for name, part in body.named_modules() if isinstance(part, _BatchNorm)), None)
    if normed:
        message = f"{model.config.model_type} models cannot be trained: {normed} computes with statistics of the batch"
        raise UserError(message, "use a base whose layers are normed token by token")
    lines: list[str] = []
    if spec.is_quantized:
        lines.append(coverage.require_few_bits(model, str(spec.quantization)))
    if isinstance(adapter, LowRank):
        lines += coverage.of(model, adapter).lines()
    _say(lines, world)


def of_dropout(model: Any, stage: Training, world: World) -> None:
    """Turn the base's own dropout off where answers are compared, as two passes over one answer must agree; say so."""
    if isinstance(stage, Pairwise):
        if were := dropout.turn_off(model):
            rates = ", ".join(f"{name} {rate:g}" for name, rate in were.items())
            _say([f"dropout is off, as answers are compared (the model has {rates})"], world)
    elif isinstance(stage, Sft) and (asked := dropout_in(model.config.get_text_config().to_dict())):
        _say([f"dropout of the model's own config is on: {asked}"], world)


def router_weight(model: Any, stage: Training, world: World, *, in_full: bool) -> float:
    """What the loss that balances experts is multiplied by; said where it is in the loss, or asked for and left out.

    Raises UserError where the stage wants it and the model has none.
    """
    halves = Halves(model)
    asks = bool(getattr(model.config.get_text_config(), "output_router_logits", False)) and halves.balances
    wanted = halves.router_weight if asks else None
    set_to = stage.router_loss if isinstance(stage, Sft) else None
    if set_to and not halves.balances:
        message = f"router_loss is {set_to:g}, and {model.config.model_type} models have no loss that balances experts"
        raise UserError(message, "remove router_loss from the stage")
    weight = set_to if set_to is not None else (wanted or 0.0) if in_full and isinstance(stage, Sft) else 0.0
    if weight:
        _say([f"in the loss: {weight:g} times the loss that balances experts"], world)
    elif wanted and set_to is None:
        _say([f"left out of the loss: {wanted:g} times the loss that balances experts, as the config asks for"], world)
    return weight


def of_merge(spec: StageSpec, base: Model, model: Any, world: World) -> None:
    """Raise UserError if the recipe merges the adapter later and the merge would fail; without a merge only say so."""
    if not isinstance(spec.adapter, LowRank):
        return
    try:
        dry_run.check(base, model)
    except UserError as error:
        if spec.merged:
            raise
        _say([f"note: {error.message}"], world)


def _say(lines: list[str], world: World) -> None:
    if world.is_main:
        for line in lines:
            print(line)
