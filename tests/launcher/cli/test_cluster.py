"""`ftlaunch doctor` and `ftlaunch attach`, with small programs in place of SLURM's: no root is needed."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.launcher.scripted_runs import write_run

from ftlaunch import cli
from ftlaunch.backend.slurm import doctor, paths
from ftlaunch.backend.slurm.doctor import Check
from ftlaunch.backend.slurm.messages import MadeBy
from ftlaunch.cluster.profiles import load_cluster
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import BAD_INPUT, DONE
from ftlaunch.processes import identify
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import RunDir


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder at the beginning of the PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "bin"


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o700)


def ends(monkeypatch: pytest.MonkeyPatch, *line: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ftlaunch", *line])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "site.toml"
    path.write_text('partition = "main"\n')
    return path


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_doctor_shows_what_is_wrong_and_fails(
    programs: Path, profile: Path, more: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program(programs, "scontrol", "echo 'Slurmctld(primary) at head is DOWN'")
    program(programs, "sinfo", "echo 'slurm 24.05.0'")
    assert ends(monkeypatch, "doctor", "--cluster", str(profile), *more) == BAD_INPUT
    shown = capsys.readouterr().out
    if more:
        assert [(check["what"], check["passed"]) for check in json.loads(shown)] == [("controller", False)]
    else:
        assert "FAIL  controller  slurm 24.05.0: Slurmctld(primary) at head is DOWN" in shown


@pytest.mark.parametrize("failing", [False, True])
def test_doctor_excludes_nodes_that_fail_where_that_is_asked(
    profile: Path, failing: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def examine(_: Cluster, nodes: int) -> Iterator[Check]:
        for number in range(nodes):
            yield Check(what="clock", passed=not (failing and number), found="", node=f"n{number}")

    monkeypatch.setattr(doctor, "examine", examine)
    line = ("doctor", "--cluster", str(profile), "--nodes", "3", "--exclude-failing")
    assert ends(monkeypatch, *line) == (BAD_INPUT if failing else DONE)
    assert load_cluster(str(profile)).exclude == (["n1", "n2"] if failing else [])
    assert ("now excludes n1, n2" in capsys.readouterr().err) is failing


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run at work as step 0 of job 55, which its user holds."""
    run = write_run(tmp_path / "runs/r", "train")
    attempt = run.stage_dir("01-sft").new_attempt(made_by=MadeBy(job="55.0", restart=0, nodes=["n2"]))
    write_json(attempt.process, identify(os.getpid()))
    return run


@pytest.mark.parametrize("conf", [None, "/site/slurm.conf"])
def test_attach_runs_a_command_on_the_node_of_a_rank(
    programs: Path, run: RunDir, conf: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ("JobId=55 JobName=bash", "JobState=RUNNING Reason=None Dependency=(null)", "StartTime=N/A", "NodeList=n2")
    program(programs, "scontrol", "printf '%s\\n' " + " ".join(f"'   {line}'" for line in (*lines, "WorkDir=/x")))
    program(programs, "srun", f'echo "$@" > {programs}/words; env > {programs}/variables; exit 7')
    if conf is not None:
        write_json(paths.cluster(run), Cluster(slurm_conf=conf))
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SRUN_CPUS_PER_TASK", "8")
    assert ends(monkeypatch, "attach", str(run.path), "--", "nvidia-smi", "-L") == 7
    words = (programs / "words").read_text()
    assert "--jobid=55 --overlap" in words
    assert words.endswith("nvidia-smi -L\n")
    # What the shell's own job says of its size would be taken for what is asked of srun.
    variables = dict(line.partition("=")[::2] for line in (programs / "variables").read_text().splitlines())
    told_to_srun = {name: value for name, value in variables.items() if name.startswith(("SLURM_", "SRUN_"))}
    assert told_to_srun == ({} if conf is None else {"SLURM_CONF": conf})


def test_attach_says_that_no_job_trains(
    programs: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program(programs, "scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert ends(monkeypatch, "attach", str(run.path)) == BAD_INPUT
    assert f"no job of r trains\n  → see how it stands: ftlaunch status {run.in_shell}" in capsys.readouterr().err
