"""Turning off what a model draws at random in training: dropout, skipped layers, and the jitter of routers."""

from typing import Any

from torch import nn


def turn_off(model: nn.Module) -> dict[str, float]:
    """Have training compute what evaluation does; return the largest rate that was on, by name.

    A rate that a layer reads from its config at each call, as Falcon's layers do, stays on: the config is the
    artifact's, too.
    """
    were: dict[str, float] = {}
    for part in model.modules():
        # A class of its own holds rates as attributes, nn.Dropout as `p`.
        rates = {name: value for name, value in vars(part).items() if "drop" in name and _is_rate(value)}
        for name, rate in rates.items():
            setattr(part, name, 0.0)
            were[name] = max(rate, were.get(name, 0.0))
        if isinstance(part, nn.Dropout) and part.p > 0:
            were["dropout"] = max(part.p, were.get("dropout", 0.0))
            part.p = 0.0
        # PhiMoE's router samples experts in training even without jitter, and its jitter is a threshold in evaluation.
        jitters = {name: value for name, value in vars(part).items() if "jitter" in name and isinstance(value, float)}
        if jitters:
            part.register_forward_pre_hook(_evaluate)
            were |= {name: max(value, were.get(name, 0.0)) for name, value in jitters.items() if value > 0}
    return were


def _is_rate(value: object) -> bool:
    return isinstance(value, float) and 0 < value <= 1


def _evaluate(router: nn.Module, _: Any) -> None:
    # Before each call, as a change of the whole model to training mode reaches the router as well.
    router.training = False
