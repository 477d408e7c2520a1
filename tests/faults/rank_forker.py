"""A process that has imported all that a rank needs, and makes ranks by fork: a moment each instead of ten seconds.

Reads orders as lines of JSON: the `step` and `attempt` folders, `world_size`, a free `port` and the `faults` to come.
It answers with the ranks' pids and then, once all have ended, with their wait statuses. Ranks run `fttrain.__main__`
with the environment that `accelerate launch` would give them; as under torch elastic, the peers of one that fails are
sent SIGTERM, then SIGKILL.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

from accelerate.commands import launch

SHUTDOWN_SECONDS = 20.0


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the log
    import_everything()
    for line in sys.stdin:
        order = json.loads(line)
        variables = environment(Path(order["step"]), order["world_size"])
        pids = [_fork(order, rank, variables) for rank in range(order["world_size"])]
        print(json.dumps(pids), file=answers, flush=True)
        print(json.dumps(wait(pids)), file=answers, flush=True)


def import_everything() -> None:
    import bitsandbytes  # noqa: F401
    import deepspeed.runtime.engine
    import deepspeed.runtime.zero.stage3
    import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import fttrain.__main__
    import fttrain.stages.sft  # noqa: F401


def environment(step: Path, world_size: int) -> dict[str, str]:
    """What `accelerate launch` sets for the ranks of this step."""
    arguments = ["--config_file", str(step / "accelerate.yaml"), "-m", "fttrain", str(step)]
    before = Path.cwd()
    os.chdir(step.parent)
    try:
        parsed = launch.launch_command_parser().parse_args(arguments)
        if world_size == 1 and not (step / "deepspeed.json").exists():
            parsed, *_ = launch._validate_launch_command(parsed)
            return launch.prepare_simple_launcher_cmd_env(parsed)[1]
        captured: dict[str, str] = {}
        with mock.patch("torch.distributed.run.run", side_effect=lambda _: captured.update(os.environ)):
            launch.launch_command(parsed)
        return captured
    finally:
        os.chdir(before)


def become_rank(order: dict, rank: int, environment: dict[str, str]) -> None:
    """Make this process, which was just forked, look as if a launcher had started it as a rank of the stage."""
    os.setpgid(0, 0)
    places = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": order["world_size"],
        "LOCAL_WORLD_SIZE": order["world_size"],
    }
    os.environ.update(environment)
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(order["port"]))
    os.chdir(Path(order["step"]).parent)
    sys.argv = ["fttrain", order["step"]]


def _fork(order: dict, rank: int, environment: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    become_rank(order, rank, environment)
    os.environ.update(FTLAUNCH_ATTEMPT=order["attempt"])
    from tests.faults.rank_faults import Fault, install

    from fttrain.__main__ import main as run_rank

    install([Fault(*fault) for fault in order["faults"]], rank)

    code = 1
    try:
        code = run_rank()
    finally:
        os._exit(code)


def wait(pids: list[int]) -> list[int]:
    """Wait statuses of all ranks, in order."""
    statuses: dict[int, int] = {}
    deadline = None
    while len(statuses) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in pids:
            statuses[pid] = status
            if status and deadline is None:
                deadline = time.monotonic() + SHUTDOWN_SECONDS
                _signal(pids, statuses, signal.SIGTERM)
        elif deadline is not None and time.monotonic() > deadline:
            _signal(pids, statuses, signal.SIGKILL)
        else:
            time.sleep(0.01)
    return [statuses[pid] for pid in pids]


def _signal(pids: list[int], ended: dict[int, int], number: signal.Signals) -> None:
    for pid in pids:
        if pid not in ended:
            os.kill(pid, number)


if __name__ == "__main__":
    main()
