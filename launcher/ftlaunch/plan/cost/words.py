"""What stages cost, as text."""

from collections.abc import Iterator

from ftlaunch.plan.cost.costs import Cost
from ftlaunch.plan.cost.fit import Misfit, WayOut
from ftlaunch.plan.cost.speed import BYTES_OF_TOKEN

GIB = 1 << 30
MIB = 1 << 20


def amount(size: int) -> str:
    """Bytes in the unit that suits them."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"


def of_stage(cost: Cost | str) -> str:
    """A stage's table, line by line."""
    return cost if isinstance(cost, str) else "\n".join(_lines(cost))


def _lines(cost: Cost) -> Iterator[str]:
    memory, device = cost.memory, cost.device
    there = "" if device.memory is None else f", of {amount(device.memory)} that there are"
    yield f"memory of each process on {device.name}: {amount(memory.peak)} at its peak{there}"
    for part in memory.parts:
        yield f"    {part.name.ljust(26)}{amount(part.bytes).rjust(10)}{_beside(cost, part.name)}"
    peaks = ", ".join(f"{name} {amount(size)}" for name, size in memory.phases.items())
    yield f"    peaks: {peaks}"
    if memory.host:
        yield f"    in the node's memory: {amount(memory.host_peak)} for each process"
    if cost.misfit is not None:
        yield from _misfit(cost.misfit)
    yield from _disk(cost)
    yield from _time(cost)
    yield from cost.remarks


def _beside(cost: Cost, name: str) -> str:
    if name != "activations":
        return ""
    if cost.with_checkpointing is not None:
        return f"   ({amount(cost.with_checkpointing)} with activation_checkpointing)"
    return "" if cost.without_checkpointing is None else f"   ({amount(cost.without_checkpointing)} if all were kept)"


def _misfit(misfit: Misfit) -> Iterator[str]:
    missing = amount(misfit.needed - misfit.available)
    yield f"does not fit: there is no room for the {misfit.part}; {missing} are missing"
    yield from (f"    {way(one)}" for one in misfit.ways)


def way(out: WayOut) -> str:
    """One way out, and what it leads to."""
    return f"{out.words}: {amount(out.needed)}{', which fits' if out.fits else ', still too much'}"


def _disk(cost: Cost) -> Iterator[str]:
    disk = cost.disk
    if disk.checkpoint:
        yield (
            f"disk: {amount(disk.checkpoints)} of checkpoints ({amount(disk.checkpoint)} each),"
            f" {amount(disk.result)} for what is trained"
        )
    elif disk.result:
        yield f"disk: {amount(disk.result)}"


def _time(cost: Cost) -> Iterator[str]:
    time = cost.time
    if time is None:
        return
    total = "" if time.total is None else f", {_duration(time.total)} for {time.steps} steps"
    hours = "" if time.device_hours is None or not cost.device.cuda else f", {time.device_hours:.2g} GPU-hours"
    if not time.step:
        yield f"time: at most about {_duration(time.total or 0)}{hours}"
        return
    of_that = f"; of that {_duration(time.evaluation)} for each evaluation" if time.evaluation else ""
    apart = "" if time.counts_evaluations else "; rows held out, which are not counted here, take more"
    yield f"time: at most about {_duration(time.step)} a step with full rows{total}{hours}{of_that}{apart}"
    if time.typical is not None:
        told = "" if time.typical.total is None else f", {_duration(time.typical.total)} for all"
        rows = f"with rows as long as the first ones, about {time.typical.tokens} tokens at {BYTES_OF_TOKEN} bytes each"
        yield f"    {rows}: {_duration(time.typical.step)} a step{told}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
