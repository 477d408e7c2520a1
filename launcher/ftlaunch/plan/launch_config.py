"""What the processes of a step are started with: accelerate.yaml, deepspeed.json, the command and its environment."""

import json
from typing import Any

from ftlaunch.recipe.model import Dtype
from ftlaunch.recipe.stages import Parallel, Training
from ftlaunch.run.spec import StageSpec


def accelerate_yaml(spec: StageSpec, step_name: str) -> str:
    """The `accelerate launch` configuration of a step, for every node; the machine's rank comes on the command line."""
    parallel = spec.parallel
    lines = [
        "compute_environment: LOCAL_MACHINE",
        f"distributed_type: {_distributed_type(parallel)}",
        f"num_machines: {parallel.nodes}",
        f"num_processes: {spec.world_size}",
        "machine_rank: 0",
        # 0 lets accelerate find a free port on one machine; `on_machine` names one where nodes have to agree.
        "main_process_port: 0",
        "rdzv_backend: static",
        "same_network: true",
        # With use_cpu accelerate drops DeepSpeed for plain DDP; `environment` is what keeps ranks on the CPU.
        "use_cpu: false",
    ]
    if parallel.zero_stage:  # accelerate refuses any key here that deepspeed.json also answers
        lines += [
            "deepspeed_config:",
            f"  deepspeed_config_file: {step_name}/deepspeed.json",
            # The default is pdsh, which needs SSH between nodes; here each node starts its own ranks.
            "  deepspeed_multinode_launcher: standard",
            f"  zero3_init_flag: {'true' if parallel.strategy == 'zero3' else 'false'}",
        ]
    return "\n".join(lines) + "\n"


def _distributed_type(parallel: Parallel) -> str:
    """accelerate's word for the strategy. MULTI_GPU starts plain torch elastic, which serves CPU ranks as well."""
    if parallel.zero_stage:
        return "DEEPSPEED"
    return "MULTI_GPU" if parallel.world_size > 1 else "'NO'"


def deepspeed_json(spec: StageSpec) -> str | None:
    """DeepSpeed's configuration with every number filled in; None where the strategy is not ZeRO."""
    if not spec.parallel.zero_stage:
        return None
    stage = spec.stage
    config: dict[str, Any] = {
        "train_batch_size": spec.micro_batch_size * spec.accumulation * spec.world_size,
        "train_micro_batch_size_per_gpu": spec.micro_batch_size,
        "gradient_accumulation_steps": spec.accumulation,
        "gradient_clipping": stage.max_grad_norm if isinstance(stage, Training) else 0.0,
        "bf16": {"enabled": _enabled("bf16", spec.model.dtype)},
        "fp16": {"enabled": _enabled("fp16", spec.model.dtype)},
        "zero_optimization": _zero(spec.parallel.zero_stage, offload=spec.parallel.offload == "cpu"),
        # If true, DeepSpeed refuses any optimizer but its own CPUAdam under offload.
        "zero_force_ds_cpu_optimizer": False,
        # The trainer writes the metrics itself, so DeepSpeed need never print.
        "steps_per_print": 2**31 - 1,
    }
    return json.dumps(config, indent=2) + "\n"


def _enabled(name: Dtype, dtype: Dtype) -> bool | str:
    """Whether a number format is on; "auto" where the trainer fills it in, once it knows the device."""
    return "auto" if dtype == "auto" else name == dtype


def _zero(zero_stage: int, *, offload: bool) -> dict[str, Any]:
    """The zero_optimization table. Nothing overlaps or is left to a heuristic, so two runs do the same arithmetic."""
    zero: dict[str, Any] = {"stage": zero_stage, "overlap_comm": False, "contiguous_gradients": True}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if zero_stage == 3:
        # DeepSpeed's default threshold would keep weights below 100,000 elements whole on every rank.
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": False}
        if offload:
            zero["offload_param"] = {"device": "cpu"}
    return zero


def command(step_name: str) -> list[str]:
    """The line that starts a step on one node, with the run folder as working directory."""
    return [
        *("accelerate", "launch", "--config_file", f"{step_name}/accelerate.yaml", "--machine_rank", "0"),
        *("-m", "fttrain", step_name),
    ]


def on_machine(command: list[str], rank: int, head: tuple[str, int] | None) -> list[str]:
    """A step's line for one of several nodes; `head` is the address and port at which they meet."""
    place = command.index("--machine_rank") + 1
    meeting = ["--main_process_ip", head[0], "--main_process_port", str(head[1])] if head else []
    return [*command[:place], str(rank), *meeting, *command[place + 1 :]]


def environment(parallel: Parallel) -> dict[str, str]:
    """Variables set on top of the caller's for a step's processes."""
    if parallel.device == "cpu":
        return {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return {}
