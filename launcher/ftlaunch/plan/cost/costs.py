"""What each stage of a plan costs: its memory, its disk and its time."""

from collections.abc import Mapping

import msgspec
from msgspec import Struct

from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.plan import machine
from ftlaunch.plan.cost import calibration, devices, disk, fit, ppo, shape, speed
from ftlaunch.plan.cost.devices import Device
from ftlaunch.plan.cost.disk import Disk
from ftlaunch.plan.cost.fit import Misfit
from ftlaunch.plan.cost.memory import Memory, of_stage
from ftlaunch.plan.cost.shape import Shape
from ftlaunch.plan.cost.speed import Time
from ftlaunch.plan.machine import NATIVE_FROM, Machine
from ftlaunch.recipe.model import Dtype
from ftlaunch.recipe.stages import Evaluate, Merge, Ppo
from ftlaunch.run.spec import StageSpec

SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of an element, by number format."""


class Cost(Struct, frozen=True, kw_only=True):
    """What one stage costs."""

    memory: Memory
    """Memory of each rank."""
    without_checkpointing: int | None = None
    """Bytes of activations if they were not computed again; None where they are not."""
    with_checkpointing: int | None = None
    """Bytes of activations if they were computed again; None where they are."""
    disk: Disk
    time: Time | None
    """None where nothing tells how fast the device is."""
    device: Device
    misfit: Misfit | None
    remarks: list[str]


def of_spec(
    spec: StageSpec, device: Device, size: int, measured: float | None = None, merged: StageSpec | None = None
) -> Cost | str:
    """The cost of a stage on a device that computes with elements of `size` bytes; or why it cannot be told.

    `measured` is how many operations a second a calibration found; without it the published peak counts. `merged` is
    the stage whose adapter a merge folds, if this plan has it.
    """
    found = shape.read(spec.model.path)
    if found is None:
        return f"not estimated: no config.json of {spec.model.path} is here, and it is not among the bases known"
    memory = _memory(spec, found, size, device, merged)
    trains = not isinstance(spec.stage, Merge | Evaluate)
    time = None if isinstance(spec.stage, Merge) else _time(spec, found, device, measured)
    return Cost(
        memory=memory,
        **(_other_activations(spec, found, size, device) if trains else {}),
        disk=disk.of_stage(spec, found, size),
        time=time,
        device=device,
        misfit=fit.misfit(spec, found, size, device, memory) if trains else None,
        remarks=_remarks(spec, found) + ([_no_time(device)] if trains and time is None else []),
    )


def _memory(spec: StageSpec, found: Shape, size: int, device: Device, merged: StageSpec | None) -> Memory:
    match spec.stage:
        case Merge() as stage:
            return disk.memory_of_merge(stage, found, size, has_rows=merged is None or _has_rows(merged))
        case Evaluate() as stage:
            return disk.memory_of_evaluation(spec, stage, found, size, cuda=device.cuda)
        case _:
            return of_stage(spec, found, size, cuda=device.cuda)


def _has_rows(trained: StageSpec) -> bool:
    """Whether rows that a stage held out are there to compare models on."""
    return not isinstance(trained.stage, Ppo) and any(
        data.test and not data.streaming for data in trained.data.values()
    )


def _other_activations(spec: StageSpec, found: Shape, size: int, device: Device) -> dict[str, int]:
    """Bytes of activations with checkpointing where there is none, and without where there is."""
    recomputes = bool(getattr(spec.stage, "activation_checkpointing", False))
    other = msgspec.structs.replace(spec.stage, activation_checkpointing=not recomputes)
    memory = of_stage(msgspec.structs.replace(spec, stage=other), found, size, cuda=device.cuda)
    kept = next((part.bytes for part in memory.parts if part.name == "activations"), 0)
    return {"without_checkpointing" if recomputes else "with_checkpointing": kept}


def _time(spec: StageSpec, found: Shape, device: Device, measured: float | None) -> Time | None:
    told = speed.of_evaluation if isinstance(spec.stage, Evaluate) else speed.of_stage
    if measured is not None:
        return told(spec, found, measured * speed.SHARE_OF_MEASURED[device.cuda], cuda=device.cuda)
    if device.teraflops is None:
        return None
    return told(spec, found, device.teraflops * 1e12 * speed.SHARE_OF_PEAK, cuda=device.cuda)


def _no_time(device: Device) -> str:
    where = " `ftlaunch plan --calibrate` measures it on the machine itself"
    return f"time: not estimated: no data sheet that is known here tells the speed of {device.name};{where}"


def _remarks(spec: StageSpec, found: Shape) -> list[str]:
    told: list[str] = []
    if shape.is_guess(found):
        told.append(f"{found.family} models are not known here: they are taken for one like Llama of the same sizes")
    if found.family in shape.ONLY_COUNTED:
        told.append(f"{found.family}: weights are counted as they are, activations as if its layers were Llama's")
    if spec.reward is not None:
        told.append("the reward model is taken for one like the policy, with the same adapter")
    if (unknown := ppo.unknown_reward_model(spec)) is not None:
        told.append(f"the reward model is not counted: no config.json of {unknown} is here")
    return told


def here(specs: Mapping[str, StageSpec]) -> dict[str, Cost | str]:
    """The cost of every stage by its name, on this machine."""
    this, measured = machine.look(), calibration.read()
    found: dict[str, Cost | str] = {}
    for name, spec in specs.items():
        device = devices.here(this, spec.parallel)
        word = settled(spec.model.dtype, this, device)
        rate = None
        if measured is not None and measured.device == device.name:
            rate = measured.operations_per_second.get(word)
            if rate is not None and not device.cuda:
                rate /= spec.parallel.procs_per_node  # it was measured with all of the CPU's cores
        found[name] = of_spec(spec, device, SIZES[word], rate, _starts_from(spec, specs))
    return found


def _starts_from(spec: StageSpec, specs: Mapping[str, StageSpec]) -> StageSpec | None:
    # `start` reads "01-sft/artifact".
    return specs.get(spec.start.partition("/")[0]) if spec.start else None


def on_cluster(specs: Mapping[str, StageSpec], cluster: Cluster) -> dict[str, Cost | str]:
    """The cost of every stage by its name, on the nodes of a cluster, as far as its profile tells of them."""
    found: dict[str, Cost | str] = {}
    for name, spec in specs.items():
        device = devices.on_cluster(cluster, spec.parallel, str(spec.stage.__struct_config__.tag))
        size = SIZES[settled(spec.model.dtype, None, device)]
        found[name] = of_spec(spec, device, size, merged=_starts_from(spec, specs))
    return found


def settled(dtype: Dtype, machine: Machine | None, device: Device) -> str:
    """The number format that "auto" comes to on a device; on a cluster's GPUs it is taken to be bf16."""
    if dtype != "auto":
        return dtype
    if device.cuda:
        old = machine is not None and any(major < NATIVE_FROM for _, major in machine.gpus)
        return "fp16" if old else "bf16"
    return "bf16" if machine is not None and machine.cpu_bf16 else "fp32"
