"""What is looked at before a stage's first step, and said: what the adapter is on, and whether it can be merged."""

from typing import Any

from ftlaunch.errors import UserError
from ftlaunch.recipe import Adapter, LowRank, Model
from ftlaunch.run.spec import StageSpec
from fttrain.adapters import coverage
from fttrain.distributed.world import World
from fttrain.merging import dry_run


def of_base(model: Any, adapter: Adapter | None, spec: Model, world: World) -> None:
    """Say which share of the model a new adapter is on, and which is in few bits. UserError where it is too little."""
    lines: list[str] = []
    if spec.is_quantized:
        lines.append(coverage.require_few_bits(model, str(spec.quantization)))
    if isinstance(adapter, LowRank):
        lines += coverage.of(model, adapter).lines()
    config = model.config.get_text_config()
    weight = getattr(config, "router_aux_loss_coef", None)
    if getattr(config, "output_router_logits", False) and weight:
        lines.append(f"left out of the loss: {weight:g} times the loss that balances experts, as the config asks for")
    _say(lines, world)


def of_merge(spec: StageSpec, base: Model, model: Any, world: World) -> None:
    """Raises UserError where a merge is to follow and would find no place for the adapter; else only says so."""
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
