"""The number format that models are computed in: what `model.dtype = "auto"` means on the device at hand."""

import platform
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch
from msgspec.structs import replace

from ftlaunch.errors import UserError
from ftlaunch.recipe.model import Dtype
from ftlaunch.recipe.stages import Training
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import StageDir
from ftlaunch.run.records import Precision
from ftlaunch.run.spec import StageSpec
from fttrain.distributed.world import World


@dataclass(frozen=True)
class Choice:
    """A number format, and why it is that one."""

    dtype: Dtype
    why: str


def native(device: torch.device) -> Choice:
    """The format to compute in on a device: bf16 where it has arithmetic for it, else fp16 on a GPU and fp32 on a CPU.

    Formats that are only emulated are "supported" by torch as well; on a CPU without bf16 instructions they are 70
    times slower than fp32.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        with torch.cuda.device(device):
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return Choice("bf16", f"{name} computes it natively")
        return Choice("fp16", f"{name} has no arithmetic for bf16")
    instructions = _bf16_instructions()
    if instructions:
        return Choice("bf16", f"the CPU computes it natively, with {instructions}")
    return Choice("fp32", "the CPU has no instructions for bf16, neither AVX512-BF16 nor AMX")


def _bf16_instructions() -> str | None:
    """Return the instructions with which oneDNN multiplies bf16 matrices on this CPU; None where it has none."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return None
    if platform.machine() in ("aarch64", "arm64"):
        return "Arm's BF16"
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    # oneDNN also "supports" bf16 on any AVX-512, by way of fp32.
    return "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else None


def computed_in(dtype: Dtype, device: torch.device | None = None) -> Dtype:
    """The format in which a tool outside a run computes a model: as it was trained, unless that is emulated here.

    Without a device it is the GPU, where there is one.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    best = native(device)
    return best.dtype if dtype == "auto" or _is_emulated(dtype, device, best) else dtype


def _is_emulated(dtype: Dtype, device: torch.device, best: Choice) -> bool:
    if dtype == "fp32" or dtype == best.dtype:
        return False
    return device.type == "cpu" or dtype == "bf16"


def settle(spec: StageSpec, folder: StageDir, world: World) -> StageSpec:
    """Return the stage's spec with the format that all ranks compute in, where its recipe leaves that open. Collective.

    A resumed stage keeps the format that it began with; a new one takes that of the previous stages. The decision is
    recorded in the stage's folder. Raises UserError where this device cannot compute in the recorded format.
    """
    if not isinstance(spec.stage, Training):  # it goes by the card of what it merges or evaluates
        return spec
    if spec.model.dtype == "auto":
        chosen = _chosen(spec, folder, world)
        spec = replace(spec, model=replace(spec.model, dtype=chosen.dtype))
        if world.is_main:
            print(f"computing in {chosen.dtype}: {chosen.why}")
    if world.is_main and _is_emulated(spec.model.dtype, world.device, native(world.device)):
        print(f"warning: {spec.model.dtype} is emulated on this device, which is many times slower than fp32")
    return spec


def _chosen(spec: StageSpec, folder: StageDir, world: World) -> Choice:
    on_record = world.from_main(_on_record(folder) if world.is_main else {})
    found = world.gather((socket.gethostname(), world.device.type, native(world.device)))
    on_gpus = all(device == "cuda" for _, device, _ in found)
    takes_fp16 = on_gpus and spec.adapter.takes_loss_scaling
    if folder.name in on_record:
        if on_record[folder.name] == "fp16" and not on_gpus:
            message = f"{folder.name} began in fp16, which needs a GPU, and there is none here"
            raise UserError(message, "resume it where there is one")
        return Choice(on_record[folder.name], "the stage began in it")
    fit = [
        Choice(dtype, f"{name} was trained in it") for name, dtype in on_record.items() if dtype != "fp16" or takes_fp16
    ]
    chosen = fit[-1] if fit else _agreed(found, takes_fp16=takes_fp16)
    if world.is_main:
        nodes = {host: f"{choice.dtype}: {choice.why}" for host, _, choice in found}
        write_json(folder.precision, Precision(dtype=chosen.dtype, why=chosen.why, nodes=nodes))
    return chosen


def _on_record(folder: StageDir) -> dict[str, Dtype]:
    """What this stage and those before it computed in, by their names, where their recipes left it open."""
    steps = [stage_dir for stage_dir in folder.run.stage_dirs() if stage_dir.name <= folder.name]
    found = {one.name: one.precision.read_bytes() for one in steps if one.precision.exists()}
    return {name: msgspec.json.decode(content, type=Precision).dtype for name, content in found.items()}


def _agreed(found: Sequence[tuple[str, str, Choice]], *, takes_fp16: bool) -> Choice:
    """One format for ranks of (host, device, choice): bf16 if it suits all, else fp16 if that does, else fp32."""
    lacking = [(host, choice) for host, _, choice in found if choice.dtype != "bf16"]
    if not lacking:
        return found[0][2]
    host, choice = lacking[0]
    where = f" ({host})" if len({host for host, _, _ in found}) > 1 else ""
    if takes_fp16:
        return Choice("fp16", f"{choice.why}{where}")
    also = " and AdaLoRA cannot be trained in fp16" if all(device == "cuda" for _, device, _ in found) else ""
    return Choice("fp32", f"{choice.why}{where}{also}")
