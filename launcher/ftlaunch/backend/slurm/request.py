"""What SLURM is asked for on behalf of a stage: its batch script, written by submitit, and what it may use up."""

import math
import re
import shlex
import sys
from bisect import bisect
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
from submitit.core.utils import FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from ftlaunch.backend.protocol import Request
from ftlaunch.backend.slurm import paths
from ftlaunch.cluster import NEW
from ftlaunch.cluster.vocabulary import Cluster, Resources, seconds
from ftlaunch.errors import UserError
from ftlaunch.plan.plan import Plan, PlannedStage
from ftlaunch.recipe.stages import Merge, Training
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import RunDir, StageDir

ALONE = re.compile(r"^(\d+)(?:;\S+)?\s*$", re.MULTILINE)
IN_WORDS = re.compile(r"^Submitted batch job (\d+)", re.MULTILINE)
"""How sbatch tells the id of a job: as asked, or where a site's own sbatch drops that wish."""
READABLE = """\
import subprocess, sys
done = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, capture_output=True)
sys.stdout.buffer.write(done.stdout.decode(errors="replace").encode())
sys.stderr.buffer.write(done.stderr.decode(errors="replace").encode())
sys.exit(done.returncode)
"""
"""Calls sbatch for submitit, which gives a job up whose site greets in another encoding than UTF-8."""
EXPORTED = ("HOME", "PATH", "USER", "LOGNAME", "LANG", "SLURM_CONF")
"""What a job has of the submitting shell. SLURM keeps and shows it, so nothing that may be secret is among it."""


class Batch(SlurmExecutor):
    """submitit's executor, which can also write its script where there is no SLURM."""

    after: str | None = None
    """What must have come of other jobs first, as sbatch --dependency takes it."""

    @classmethod
    def affinity(cls) -> int:
        # submitit constructs no executor where srun is missing; a dry run needs no more than the script.
        return 2

    def text(self) -> str:
        return self._make_submission_file_text(self._submitit_command_str, "")

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        dependency = [f"--dependency={self.after}"] if self.after else []
        # In a session of its own: a Ctrl-C in the terminal must not end it half-way.
        return [
            "setsid",
            sys.executable,
            # Isolated and without site-packages: the helper needs the standard library alone.
            "-IS",
            "-c",
            READABLE,
            "sbatch",
            "--parsable",
            *dependency,
            str(submission_file_path),
        ]

    @staticmethod
    def _get_job_id_from_submission_command(string: str | bytes) -> str:
        """The id in what sbatch has printed, whatever a site prints around it."""
        text = string if isinstance(string, str) else string.decode(errors="replace")
        if not (found := ALONE.findall(text) or IN_WORDS.findall(text)):
            raise FailedSubmissionError(f"sbatch: error: it has told no job id, but {text.strip()[:500]!r}")
        # A site's banner may hold numbers as well; sbatch's own line is the last.
        return found[-1]


def request(plan: Plan, planned: PlannedStage, cluster: Cluster) -> Request:
    """What SLURM will be asked for. Nothing is looked up but what an earlier attempt took, so no SLURM need be here."""
    return Request(
        script=executor(plan, planned, cluster).text(),
        price=_price(planned, cluster),
        cpus=_cpus(planned, cluster),
        saving=_saving(plan, planned, cluster) if isinstance(planned.spec.stage, Training) else None,
    )


def _cpus(planned: PlannedStage, cluster: Cluster) -> str:
    count = _resources(planned, cluster).cpus_per_node
    processes = planned.spec.parallel.procs_per_node
    given = f"{count} CPUs" if count else "as many CPUs as the site gives by default, often one (cpus_per_node)"
    return f"{given} for {processes} process{'es' if processes > 1 else ''} a node"


def _saving(plan: Plan, planned: PlannedStage, cluster: Cluster) -> str:
    longest = longest_step(RunDir(Path(plan.run_dir)).stage_dir(planned.name))
    known = "must fit into" if longest is None else f"have taken {longest:.0f} s of so far"
    return f"{cluster.signal_lead} s before the time limit, which a step and a save {known}"


def longest_step(stage_dir: StageDir) -> float | None:
    """Seconds of the longest step so far, with the save or the evaluation after it; None where none was measured."""
    starts = sorted(one.process.stat().st_mtime for one in stage_dir.all_attempts() if one.process.exists())
    times = (entry["time"] for entry in read_jsonl(stage_dir.metrics) if "time" in entry)
    # Between entries of two attempts lies time in the queue, so those pairs are left out.
    pauses = (after - before for before, after in pairwise(times) if bisect(starts, before) == bisect(starts, after))
    return max(pauses, default=None)


def require_time_to_save(run: RunDir, plan: Plan, cluster: Cluster) -> None:
    """UserError where a step of an unfinished stage has taken longer than signal_lead."""
    for planned in plan.stages:
        stage_dir = run.stage_dir(planned.name)
        longest = None if stage_dir.result.exists() else longest_step(stage_dir)
        if longest is not None and longest > cluster.signal_lead:
            took = f"a step and a save have taken {longest:.0f} s, and signal_lead is {cluster.signal_lead} s"
            raise UserError(
                f"{stage_dir.name}: {took}: at a time limit or a preemption nothing could be saved",
                f"write signal_lead = {2 * math.ceil(longest)} into the profile, or into {NEW} where there is none, and"
                f" name it: ftlaunch resume {run.in_shell} --cluster NAME",
            )


def _price(planned: PlannedStage, cluster: Cluster) -> str:
    """nodes × GPUs × time limit, of one start and of all that there may be."""
    parallel = planned.spec.parallel
    limit = _resources(planned, cluster).time_limit or cluster.time_limit
    gpus = parallel.procs_per_node if _gpus(planned, cluster) else 0
    hours = parallel.nodes * (gpus or 1) * seconds(limit) / 3600
    unit = "GPU" if gpus else "node"
    size = f"{parallel.nodes} node{'s' if parallel.nodes > 1 else ''}{f' × {gpus} GPUs' if gpus else ''} × {limit}"
    starts = cluster.most_restarts + 1
    return f"{size} = {_number(hours)} {unit}-hours a start; at most {_number(hours * starts)} in {starts} starts"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def executor(plan: Plan, planned: PlannedStage, cluster: Cluster) -> Batch:
    """What submits a stage. Its folder of jobs is made as soon as it does."""
    run = RunDir(Path(plan.run_dir))
    # In #SBATCH --output, SLURM expands %j and the like, and a backslash turns that off.
    if {*plan.run_dir} & {*"%\\"}:
        raise UserError(f"{run.path} holds a % or a backslash, which SLURM reads otherwise", "choose another --run-dir")
    made = Batch(paths.jobs(run.stage_dir(planned.name)), python=_python(run, planned, cluster))
    made.update_parameters(**_parameters(run, plan, planned, cluster))
    return made


def _python(run: RunDir, planned: PlannedStage, cluster: Cluster) -> str:
    """The words of the shell that start Python on a node, in a container where the profile names one."""
    python = cluster.python or sys.executable
    kind, _, image = cluster.container.partition(":")
    if kind != "apptainer":
        return shlex.quote(python)
    folders = _mounts(run, cluster)
    gpu = ["--nv"] if _gpus(planned, cluster) else []
    return shlex.join(["apptainer", "exec", *gpu, *(f"--bind={folder}" for folder in folders), image, python])


def _parameters(run: RunDir, plan: Plan, planned: PlannedStage, cluster: Cluster) -> dict[str, Any]:
    resources = _resources(planned, cluster)
    code = shlex.quote(str(paths.packages(run)))
    is_last = planned is plan.stages[-1]
    options: dict[str, Any] = {
        "job_name": f"{planned.spec.name}/{planned.name}",
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "exclude": ",".join(cluster.exclude) or None,
        "nodes": planned.spec.parallel.nodes,
        # One task per node: `accelerate launch` starts the ranks there.
        "ntasks_per_node": 1,
        "cpus_per_task": resources.cpus_per_node,
        "mail_user": cluster.mail,
        "mail_type": ("END,FAIL" if is_last else "FAIL") if cluster.mail else None,
        "wckey": None,
        "signal_delay_s": cluster.signal_lead,
        "stderr_to_stdout": True,
        "setup": [*_guarded(cluster.setup), f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}"],
        "teardown": _last_words(run, planned, cluster),
        "srun_args": _srun(run, resources, cluster),
        "additional_parameters": _flags(run, planned, resources, cluster),
    }
    # Without an explicit None submitit writes --wckey=submitit, which a site may not know.
    return {key: value for key, value in options.items() if value is not None or key == "wckey"}


def _guarded(setup: list[str]) -> list[str]:
    """The profile's lines, the first of which that fails ends the job and is named; not what runs inside of them."""
    if not setup:
        return []
    # BASH_SOURCE has several entries within a function or a sourced file, where a command may fail on purpose.
    on_error = 'code=$?; [ -n "$ftlaunch_ready" ] || [ ${#BASH_SOURCE[@]} -gt 1 ] || exit $code'
    told = 'echo "ftlaunch: setup ended the job with exit code $code at: $BASH_COMMAND" >&2'
    on_exit = f'code=$?; [ -n "$ftlaunch_ready" ] || {{ {told}; [ $code != 0 ] || exit 1; }}'
    return [f"trap {shlex.quote(on_error)} ERR", f"trap {shlex.quote(on_exit)} EXIT", *setup, "ftlaunch_ready=1"]


def _last_words(run: RunDir, planned: PlannedStage, cluster: Cluster) -> list[str] | None:
    """What follows srun: a look whether it has killed tasks that could not see to the job any more."""
    # Nothing to requeue: a successor takes over once this job has failed.
    if cluster.restart == "successor":
        return None
    folder = shlex.quote(str(run.stage_dir(planned.name).path))
    look = f"{_python(run, planned, cluster)} -P -m ftlaunch.backend.slurm.epilogue {folder} $code"
    if inside := _pyxis(run, cluster):
        options = shlex.join([*cluster.srun, "--nodes=1", "--ntasks=1", "--export=ALL", *inside])
        look = f'srun {options} --nodelist="$SLURMD_NODENAME" {look}'
    return ["code=$?", f"[ $code = 0 ] || {look}", "exit $code"]


def _resources(planned: PlannedStage, cluster: Cluster) -> Resources:
    return cluster.resources(planned.name.partition("-")[2])


def fits_into(following: PlannedStage, now: PlannedStage, cluster: Cluster) -> bool:
    """Whether the job of one stage has all that another asks for: its nodes, resources and GPUs."""
    wanted, given = (msgspec.structs.replace(_resources(one, cluster), time_limit=None) for one in (following, now))
    gpus = _gpus(following, cluster)
    enough = following.spec.parallel.nodes <= now.spec.parallel.nodes and gpus in ({}, _gpus(now, cluster))
    return enough and wanted == given and cluster.restart == "requeue"


def _srun(run: RunDir, resources: Resources, cluster: Cluster) -> list[str]:
    """One failed task ends the others; the CPUs are handed on, which srun does not do by itself since 22.05."""
    handed_on = [f"--cpus-per-task={resources.cpus_per_node}"] if resources.cpus_per_node else []
    options = ["--kill-on-bad-exit=1", "--wait=60", "--export=ALL", *handed_on, *_pyxis(run, cluster)]
    return [*options, *cluster.srun]


def _pyxis(run: RunDir, cluster: Cluster) -> list[str]:
    """Flags with which srun starts tasks in the profile's container; none where it names no image for Pyxis."""
    kind, _, image = cluster.container.partition(":")
    mounts = ",".join(_mounts(run, cluster))
    return [f"--container-image={image}", f"--container-mounts={mounts}"] if kind == "pyxis" else []


def _mounts(run: RunDir, cluster: Cluster) -> list[str]:
    """Folders that a container sees, each as HOST:INSIDE."""
    if cluster.container != "none" and {*str(run.path)} & {*":,"}:
        raise UserError(f"{run.path} cannot be mounted: it holds a colon or a comma", "choose another --run-dir")
    return [folder if ":" in folder else f"{folder}:{folder}" for folder in (str(run.path), *cluster.mounts)]


def _flags(run: RunDir, planned: PlannedStage, resources: Resources, cluster: Cluster) -> dict[str, Any]:
    flags: dict[str, Any] = {
        "chdir": str(run.path),
        "export": ",".join(EXPORTED),
        # Later jobs would otherwise wait for ever (DependencyNeverSatisfied) after a failed stage.
        "kill-on-invalid-dep": "yes",
        "requeue" if cluster.restart == "requeue" else "no-requeue": True,
        "time": resources.time_limit,
    }
    if resources.memory_per_node:
        flags["mem"] = resources.memory_per_node
    flags |= _gpus(planned, cluster)
    return flags | {key: value for key, value in cluster.sbatch.items() if value is not False}


def _gpus(planned: PlannedStage, cluster: Cluster) -> dict[str, str]:
    style, _, kind = cluster.gpus.partition(":")
    if style == "none" or planned.spec.parallel.device == "cpu" or isinstance(planned.spec.stage, Merge):
        return {}
    count = f"{f'{kind}:' if kind else ''}{planned.spec.parallel.procs_per_node}"
    return {"gres": f"gpu:{count}"} if style == "gres" else {"gpus-per-node": count}
