"""Verbs that take a run. What they need is imported when they are called: startup time is a feature."""

import contextlib
import os
import shlex
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from ftlaunch.cli import text, trainer
from ftlaunch.cli.options import (
    After,
    AttemptNumber,
    ClusterName,
    Detach,
    Json,
    Nodes,
    ProcsPerNode,
    RunName,
    Settings,
    Site,
    StageName,
    all_settings,
)
from ftlaunch.errors import DONE, STAGE_FAILED, UserError

if TYPE_CHECKING:
    from ftlaunch.plan.plan import Plan
    from ftlaunch.run.layout import RunDir


def dependency(after: str | None, *, on_cluster: bool) -> str | None:
    """What --after means to sbatch: a job's number, or the last job of a run. UserError where it means nothing."""
    from ftlaunch.cluster.queue import dependency_on
    from ftlaunch.watch import runs

    if after is None:
        return None
    if not on_cluster:
        raise UserError("--after is for jobs of a cluster", "add --cluster NAME")
    return f"afterok:{after}" if after.isdecimal() else dependency_on(runs.find(after))


def require_here(plan: "Plan") -> None:
    """UserError where a plan cannot run on this machine, nor on nodes that are held."""
    from ftlaunch.backend.local.driver import refuse_several_nodes

    if not _holds_nodes_for(plan):
        refuse_several_nodes(plan)
    trainer.require()


def _holds_nodes_for(plan: "Plan") -> bool:
    """Whether a plan is to run on nodes of a job that this process is in."""
    if "SLURM_JOB_ID" not in os.environ:
        return False
    from ftlaunch.backend.slurm.held import is_for

    return is_for(plan) is not None


LOOKED_INTO_BYTES = 64 * 2**20
"""A larger file is not read to tell whether it has changed, unless a digest of it as it is now is kept."""


def start(folder: "RunDir", *, detach: bool, fresh: bool = False, after: str | None = None) -> int:
    """Drive a written run here, in the background or on its cluster; the exit code.

    `fresh`: the folder was written just now, and goes away where its jobs cannot be submitted.
    """
    from ftlaunch.run import outputs
    from ftlaunch.watch import runs

    where = folder.path
    quoted = shlex.quote(str(where))
    if runs.finished(folder):
        print(f"{where.name} is already finished: {where}\n{outputs.describe(folder)}".rstrip(), file=sys.stderr)
        return DONE
    if folder.cluster.exists():
        return _submit(folder, fresh=fresh, after=after)
    require_here(plan := runs.read_plan(folder))
    if "SLURM_JOB_ID" in os.environ or folder.held.exists():
        from ftlaunch.backend.slurm.held import claim

        claim(folder, plan)
    if not detach:
        return _drive(folder)
    from ftlaunch.backend import control

    control.drive_detached(folder)
    print(f"{where.name} runs in the background. Come back with", file=sys.stderr)
    print(f"  ftlaunch status {quoted}\n  ftlaunch logs -f {quoted}\n  ftlaunch stop {quoted}")
    return DONE


def _drive(folder: "RunDir", lock: int | None = None) -> int:
    """Drive a written run to its end, and leave a report of it, however it ended; the exit code."""
    from ftlaunch.backend import control
    from ftlaunch.report.write import write_report

    code = control.drive_here(folder, lock)
    try:
        page = write_report(folder, with_plots=False)
    except (OSError, UserError) as error:
        print(f"there is no report of {folder.path.name}: {error}", file=sys.stderr)
    else:
        print(f"report: {page}", file=sys.stderr)
    return code


def _submit(folder: "RunDir", *, fresh: bool, after: str | None) -> int:
    from ftlaunch.backend.prepare import discard
    from ftlaunch.backend.slurm import submit
    from ftlaunch.backend.slurm.carried import not_heeded
    from ftlaunch.watch import runs

    if job := os.environ.get("SLURM_JOB_ID"):
        print(f"you are in job {job}: this submits other jobs; without --cluster its nodes are used", file=sys.stderr)
    if (said := not_heeded()) is not None:
        print(f"warning: {said}", file=sys.stderr)
    try:
        jobs = submit.submit(folder, runs.read_plan(folder), after)
    except UserError as error:
        if fresh and not folder.submission.exists():
            discard(folder)
            error.remedy = error.remedy.partition(submit.OR_RESUME)[0] + "; run it again then: nothing is left of it"
        raise
    where = shlex.quote(str(folder.path))
    ids = ", ".join(f"job {job.id}" for job in jobs)
    print(f"{folder.path.name} is submitted: {ids}. Come back with", file=sys.stderr)
    print(f"  ftlaunch status {where}\n  ftlaunch logs -f {where}\n  ftlaunch stop {where}")
    _warn_of_waiting(folder)
    return DONE


def _warn_of_waiting(folder: "RunDir") -> None:
    """Say so at once where SLURM will not start a job as it is."""
    from ftlaunch.cluster import queue, reasons

    answer = queue.ask([folder])[0]
    for stage_dir in folder.stage_dirs():
        if (entry := answer.of(stage_dir)) and entry.state == "PENDING" and reasons.never_starts(entry.reason):
            print(f"warning: {stage_dir.name} {reasons.why_waiting(entry.reason)}", file=sys.stderr)


def status(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run's folder or name. Default: all runs.")
    ] = None,
    json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Stay, as `ftlaunch watch` does, until it is over.")] = False,
) -> None:
    """Show how a run stands, or list all runs below ./runs.

    Example: ftlaunch status my-run
    """
    import msgspec

    from ftlaunch.cli.watch import watch as keep_watching
    from ftlaunch.run.changes import changes
    from ftlaunch.watch import runs
    from ftlaunch.watch.status import read_all, read_status

    if watch:
        if json:
            raise UserError("--watch shows runs on the screen, and --json is for programs", "leave one of them out")
        keep_watching([run] if run else None)
        return
    if run is not None:
        folder = runs.find(run)
        found = msgspec.structs.replace(read_status(folder), changed=changes(folder, at_most=LOOKED_INTO_BYTES))
        print(text.as_json(found) if json else text.run_status(found))
        return
    every = read_all(runs.all_runs())
    if not every and not json:
        print(f"there are no runs below {runs.HOME.absolute()}", file=sys.stderr)
        return
    print(text.as_json(every) if json else text.run_list(every))


def logs(
    run: RunName,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as more is said, until the run ends.")] = False,
    stage: StageName = None,
    rank: Annotated[int | None, typer.Option("--rank", metavar="K", help="Only rank K.")] = None,
    node: Annotated[str | None, typer.Option("--node", metavar="NAME", help="Only ranks on that node.")] = None,
    first_error: Annotated[bool, typer.Option("--first-error", help="Show what went wrong first, in full.")] = False,
    attempt: AttemptNumber = None,
) -> None:
    """Print what the processes of a run said.

    Example: ftlaunch logs -f my-run --rank 0
    """
    from ftlaunch.processes.outcome import describe_in_full
    from ftlaunch.watch import logs, runs

    folder = runs.find(run)
    if first_error:
        print(describe_in_full(logs.first_error(folder, stage, attempt)))
    elif follow:
        with contextlib.suppress(KeyboardInterrupt):  # it stops the following, not the run
            _print(logs.follow(folder, stage, attempt, rank, node))
    else:
        _print(logs.read(folder, stage, attempt, rank, node))


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


def stop(
    run: RunName,
    wait: Annotated[float, typer.Option("--wait", min=0, metavar="SECONDS", help="Wait so long for its end.")] = 0,
) -> None:
    """Have a run save and leave; it can be resumed.

    Example: ftlaunch stop my-run --wait 60
    """
    from ftlaunch.backend import control
    from ftlaunch.watch import runs
    from ftlaunch.watch.status import read_status

    folder = runs.find(run)
    over = control.ask_to_stop(folder, wait)
    now = read_status(folder) if over else None
    if now is not None and now.state == "failed":
        note = next((stage.note for stage in now.stages if stage.state == "failed"), None)
        print(f"{folder.path.name} has ended, and failed on its way: {note}", file=sys.stderr)
        raise typer.Exit(STAGE_FAILED)
    print(f"{folder.path.name} has {'stopped' if over else 'been asked to save and stop'}", file=sys.stderr)


def cancel(run: RunName) -> None:
    """End a run at once, without saving.

    Example: ftlaunch cancel my-run
    """
    from ftlaunch.backend import control
    from ftlaunch.watch import runs

    folder = runs.find(run)
    ended = control.cancel(folder)
    print(f"{folder.path.name} {'has been ended' if ended else 'was not running'}", file=sys.stderr)


def resume(
    run: RunName,
    settings: Settings = None,
    nodes: Nodes = None,
    procs_per_node: ProcsPerNode = None,
    cluster: ClusterName = None,
    site: Site = None,
    after: After = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Go on though data or base are not what the run began with.")
    ] = False,
    detach: Detach = False,
) -> None:
    """Go on with a run from its newest checkpoint, also with other processes.

    Example: ftlaunch resume my-run --procs-per-node 4 --set parallel.strategy=zero2
    """
    from ftlaunch.backend.replan import replan, save_plan
    from ftlaunch.watch import runs

    folder = runs.find(run)
    if not runs.finished(folder):
        _mind_changes(folder, accepted=changed)
    here = cluster is None and not folder.cluster.exists()
    if here:
        trainer.require()
    else:
        from ftlaunch.backend.slurm.submit import require_rest

        if folder.cluster.exists():
            require_rest(folder)
    if cluster is not None:
        _move(folder, cluster, site or [])
    elif site:
        raise UserError("--site sets keys of a cluster's profile, and none is named", "add --cluster NAME")
    if asked := all_settings(settings, nodes, procs_per_node):
        planned = replan(folder, asked)
        if here:
            require_here(planned)
        save_plan(folder, planned)
        print(text.summary(planned), file=sys.stderr)
    waited_for = dependency(after, on_cluster=folder.cluster.exists())
    raise typer.Exit(start(folder, detach=detach, after=waited_for))


def _mind_changes(folder: "RunDir", *, accepted: bool) -> None:
    """Refuse to go on with other data or another base than the run began with, unless that is accepted."""
    from ftlaunch.run import changes

    if not accepted:
        changes.require_unchanged(folder)
        return
    for change in changes.accept(folder):
        print(f"{change}: the run goes on with it as it is", file=sys.stderr)


def _move(folder: "RunDir", cluster: str, site: list[str]) -> None:
    """Have a run that is at rest go on by a cluster's profile as it is now."""
    from ftlaunch.cluster.profiles import load_cluster
    from ftlaunch.processes import lock
    from ftlaunch.run.files import write_json

    profile = load_cluster(cluster, site)
    held = lock.take(folder)
    try:
        write_json(folder.cluster, profile)
    finally:
        lock.release(held)


def drive(run: RunName, lock: Annotated[int | None, typer.Option("--lock")] = None) -> None:
    """Drive a written run whose lock this process has inherited: what --detach starts."""
    from ftlaunch.watch import runs

    raise typer.Exit(_drive(runs.find(run), lock))
