"""A rank that the kernel kills for lack of memory is told from one that somebody has killed."""

import os
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest
from tests.launcher.scripted_runs import write_run

from ftlaunch.backend import runs
from ftlaunch.backend.slurm.restart_policy import ran_out_of_memory
from ftlaunch.backend.supervisor import run_attempt
from ftlaunch.processes import memory
from ftlaunch.processes.outcome import Failure, tell_death
from ftlaunch.run.layout import RunDir

GROUPS = Path("/sys/fs/cgroup")
LIMIT = 200 << 20


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("4:memory:/slurm/uid_0/job_5/step_0/task_0", "memory/slurm/uid_0/job_5/step_0/task_0/memory.oom_control"),
        ("0::/system.slice/slurmstepd.scope/job_5", "system.slice/slurmstepd.scope/job_5/memory.events"),
    ],
)
def test_the_kernels_count_is_found_in_both_versions_of_groups(tmp_path: Path, line: str, file: str) -> None:
    (tmp_path / "self").mkdir()
    assert memory.kills(tmp_path, tmp_path / "groups") == 0
    (tmp_path / "self/cgroup").write_text(f"9:name=systemd:/\n8:pids:/\n{line}\n")
    assert memory.kills(tmp_path, tmp_path / "groups") == 0
    (tmp_path / "groups" / file).parent.mkdir(parents=True)
    (tmp_path / "groups" / file).write_text("low 0\nunder_oom 0\noom_kill_disable 0\noom_kill 3\n")
    assert memory.kills(tmp_path, tmp_path / "groups") == 3


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group with little memory, of either version."""
    first, second = (GROUPS / "memory", "memory.limit_in_bytes"), (GROUPS, "memory.max")
    place, limit = first if first[0].is_dir() else second
    folder = place / f"ftlaunch-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / limit).write_text(str(LIMIT))
    except OSError as error:
        if folder.is_dir():
            folder.rmdir()
        pytest.skip(f"no control group with a limit of memory can be made here: {error}")
    yield folder
    folder.rmdir()


def _limited(group: Path, run: RunDir) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))
    stage_dir = run.stage_dirs()[0]
    run_attempt(runs.read_plan(run).stages[0], stage_dir, stage_dir.new_attempt(), dict(os.environ), lambda: "go on")


def test_a_rank_that_the_kernel_kills_has_run_out_of_memory(group: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "use_up_memory")
    # A fork of a grown pytest would bring its own pages into the group as it writes to them.
    child = get_context("spawn").Process(target=_limited, args=(group, run))
    child.start()
    child.join()
    (attempt,) = run.stage_dirs()[0].all_attempts()
    failure = tell_death(attempt, 1)
    assert failure.message == "killed by SIGKILL, as the kernel ran out of memory for it"
    assert "memory_per_node" in (failure.remedy or "")
    assert ran_out_of_memory(failure)
    assert not ran_out_of_memory(Failure(rank=0, type="SIGKILL", message="killed by SIGKILL", log=""))
