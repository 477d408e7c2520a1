"""Which elements of weights and optimizer state live on this rank, as views that can be read and written in place."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fttrain.engine import Engine

WEIGHT = "weight"


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of one flattened tensor: a parameter's fp32 master, or a part of its optimizer state."""

    key: str
    """`name|weight`, `name|exp_avg`, …"""
    offset: int
    tensor: Tensor
    """Flat; a view of the live state."""

    def __len__(self) -> int:
        return self.tensor.numel()

    @property
    def end(self) -> int:
        """The element after the last."""
        return self.offset + len(self)


def owned(engine: Engine) -> list[Piece]:
    """Return what this rank saves. All ranks' pieces together cover every element of the trained state exactly once.

    Without ZeRO every rank holds everything, and saves its share of the bytes: a few whole tensors and parts of two.
    """
    pieces = held(engine)
    if engine.zero_stage:
        return pieces
    return list(_share(pieces, engine.world.rank, engine.world.size))


def _share(pieces: list[Piece], rank: int, size: int) -> Iterator[Piece]:
    total = sum(piece.tensor.nbytes for piece in pieces)
    first, end = total * rank // size, total * (rank + 1) // size
    # Pieces lie end to end on a line of bytes, of which this rank has [first, end). An element belongs to the rank in
    # whose stretch it begins: both edges are rounded up to the next element, so none is saved twice or left out.
    begun = 0
    for piece in pieces:
        width = piece.tensor.element_size()
        inside = range(*(min(len(piece), max(0, -(-(edge - begun) // width))) for edge in (first, end)))
        if inside:
            yield Piece(piece.key, inside.start, piece.tensor[inside.start : inside.stop])
        begun += piece.tensor.nbytes


def held(engine: Engine) -> list[Piece]:
    """Return what this rank holds, which a checkpoint must fill when it is loaded."""
    if engine.zero_stage == 3:
        return list(_zero3(engine))
    return list(_zero12(engine) if engine.zero_stage else _replicated(engine))


def _replicated(engine: Engine) -> Iterator[Piece]:
    _begin_state(engine.optimizer)
    for name, parameter in engine.trained_parameters():
        yield Piece(f"{name}|{WEIGHT}", 0, parameter.detach().view(-1))
        for slot, tensor in _slots(engine.optimizer.state[parameter]).items():
            yield Piece(f"{name}|{slot}", 0, tensor.view(-1))


def _zero12(engine: Engine) -> Iterator[Piece]:
    # ZeRO 1 and 2 lay all weights of a group end to end and cut that line by ranks, in the middle of tensors. The
    # fp32 masters of this rank's stretch are one flat tensor; each weight has a mapping to its place in it (`hp`, high
    # precision) and to the elements of the weight that these are (`lp`, low precision).
    zero = engine.zero
    _begin_state(zero.optimizer)
    for name, parameter in engine.trained_parameters():
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:  # wholly on other ranks
            continue
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        here = mapping.hp_fragment_address
        offset = mapping.lp_fragment_address.start
        yield from _views(name, offset, flat, zero.optimizer.state[flat], here.start, here.numel)


def _zero3(engine: Engine) -> Iterator[Piece]:
    # ZeRO-3 cuts every weight by itself into as many equal parts as there are ranks, so rank r always has the elements
    # from r · length on; the parts that fall to this rank lie end to end in its group's flat tensor.
    zero = engine.zero
    _begin_state(zero.optimizer, zero.fp32_partitioned_groups_flat)
    for name, parameter in engine.trained_parameters():
        group, start, length = zero.grad_position[zero.get_param_id(parameter)]
        flat = zero.fp32_partitioned_groups_flat[group]
        offset = length * engine.world.rank
        real = min(length, parameter.ds_numel - offset)  # type: ignore[attr-defined] # shards are padded to one length
        if real > 0:
            yield from _views(name, offset, flat, zero.optimizer.state[flat], start, real)


def _views(name: str, offset: int, flat_P: Tensor, state: dict[str, Any], start: int, length: int) -> Iterator[Piece]:
    for slot, tensor in {WEIGHT: flat_P, **_slots(state)}.items():
        yield Piece(f"{name}|{slot}", offset, tensor.detach().narrow(0, start, length))


def _slots(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an optimizer state: all but the step counter and bitsandbytes' constant tables."""
    tensors = {slot: value for slot, value in state.items() if isinstance(value, Tensor)}
    return {slot: value for slot, value in tensors.items() if slot != "step" and not slot.startswith("qmap")}


def _begin_state(optimizer: Any, flats: list[Tensor] | None = None) -> None:
    """Make the state that the optimizer itself would make at its first step, where there is none yet.

    A checkpoint is loaded before that step, and needs tensors to fill.
    """
    if hasattr(optimizer, "init_state"):  # bitsandbytes
        for group_index, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                if not optimizer.state[parameter]:
                    optimizer.init_state(group, parameter, group_index, index)
        return
    tensors = flats or [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for tensor in tensors:
        if not optimizer.state[tensor]:
            moments = {slot: torch.zeros_like(tensor.detach()) for slot in ("exp_avg", "exp_avg_sq")}
            optimizer.state[tensor].update(step=torch.tensor(0.0), **moments)


def adopt(engine: Engine, optimizer_steps: int) -> None:
    """Make the live model follow pieces that were just filled, with the optimizer's step counters set. Collective."""
    optimizer = engine.zero.optimizer if engine.zero_stage else engine.optimizer
    for state in optimizer.state.values():
        state["step"] = optimizer_steps if isinstance(state["step"], int) else torch.tensor(float(optimizer_steps))
    if engine.zero_stage:
        engine.follow_masters()
