"""What a model loses with its super weights: perplexity with single weights zeroed, restored and scaled."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fttrain.evaluation import perplexity
from fttrain.superweights.projections import Place, Projection, scaled

SCALES = (0.0, 0.2, 0.5, 0.8, 1.0, 1.5, 2.0, 3.0)
"""The paper's factors."""
NEIGHBOURS = 10
"""Random weights are drawn from so many times as many that are nearest in size."""


def at_scale(
    model: Any, down: dict[int, Projection], places: Sequence[Place], windows: list[Tensor], factor: float = 0.0
) -> float:
    """Return the perplexity with all these weights multiplied by `factor`, by default with them zeroed."""
    with scaled(down, places, factor):
        return perplexity.perplexity(model, windows)


def random_like(down: dict[int, Projection], places: Sequence[Place], count: int, seed: int) -> list[Place]:
    """`count` weights of down projections, drawn from those nearest in size to one of `places`, none of which is in it.

    Each of `places` is the measure of an equal share of the draw, give or take one.
    """
    draw = torch.Generator().manual_seed(seed)
    chosen: dict[Place, None] = {}
    for number, place in enumerate(places):
        share = count * (number + 1) // len(places) - count * number // len(places)
        size = float(down[place.layer].matrix[place.row, place.column].abs())
        taken = {*places, *chosen}
        # Of nearly the same size: else the comparison would show only that large weights matter.
        near = [one for one in _nearest(down, size, NEIGHBOURS * count + len(taken)) if one not in taken]
        order = torch.randperm(min(len(near), NEIGHBOURS * share), generator=draw)[:share]
        chosen |= dict.fromkeys(near[index] for index in order.tolist())
    return list(chosen)


def _nearest(down: dict[int, Projection], size: float, count: int) -> list[Place]:
    """Weights nearest in magnitude to `size`, nearest first."""
    found: list[tuple[float, Place]] = []
    for projection in down.values():
        distance = (projection.matrix.abs().float() - size).abs()
        nearest = distance.flatten().topk(min(count, distance.numel()), largest=False)
        width = distance.shape[1]
        places = (Place(projection.layer, *divmod(index, width)) for index in nearest.indices.tolist())
        found += zip(nearest.values.tolist(), places, strict=True)
    return [place for _, place in sorted(found, key=lambda one: one[0])[:count]]


def restored(model: Any, down: dict[int, Projection], places: Sequence[Place], windows: list[Tensor]) -> float:
    """Perplexity with these weights zeroed, but each window's super activation put back where it was.

    That is one number a weight and window: the largest value of the output channel, at its own token only.
    """

    def losses() -> Iterator[Tensor]:
        for window in windows:
            # Noted on the intact model, before the weights are zeroed.
            held = _activations(model, down, places, window)
            with scaled(down, places, 0.0), _put_back(down, held):
                yield perplexity.token_losses(model, window)

    return perplexity.perplexity_of(losses())


Activation = tuple[Place, int, float]
"""A weight, the token at which its output channel is largest, and how large."""


def _activations(model: Any, down: dict[int, Projection], places: Sequence[Place], window: Tensor) -> list[Activation]:
    """Return each weight's activation where it is largest in a window [1, T]."""
    held: list[Activation] = []

    def note(place: Place, _module: nn.Module, _inputs: Any, output_1TJ: Tensor) -> None:
        channel_T = output_1TJ[0][:, place.row]
        token = int(channel_T.abs().argmax())
        held.append((place, token, float(channel_T[token])))

    with ExitStack() as hooks:
        for place in places:
            hooks.enter_context(down[place.layer].module.register_forward_hook(partial(note, place)))
        perplexity.token_losses(model, window)
    return held


@contextmanager
def _put_back(down: dict[int, Projection], held: list[Activation]) -> Iterator[None]:
    def put(row: int, token: int, value: float, _module: nn.Module, _inputs: Any, output_1TJ: Tensor) -> Tensor:
        output_1TJ = output_1TJ.clone()
        output_1TJ[0, token, row] = value
        return output_1TJ

    with ExitStack() as hooks:
        for place, token, value in held:
            module = down[place.layer].module
            hooks.enter_context(module.register_forward_hook(partial(put, place.row, token, value)))
        yield
