"""Verbs that take a run. What they need is imported when they are called: startup time is a feature."""

import contextlib
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from ftlaunch.cli import options, text
from ftlaunch.cli.profile import backend_named
from ftlaunch.errors import DONE, STAGE_FAILED, UserError

if TYPE_CHECKING:
    from ftlaunch.run.layout import RunDir


LOOKED_INTO_BYTES = 64 * 2**20
"""A larger file is not read to tell whether it has changed, unless a digest of it as it is now is kept."""


def start(folder: "RunDir", *, detach: bool, fresh: bool = False, after: str | None = None) -> int:
    """Start a written run where it belongs; the exit code.

    `fresh`: the folder was written just now, and goes away where its jobs cannot be submitted.
    """
    from ftlaunch.backend import backends, runs
    from ftlaunch.run import outputs
    from ftlaunch.run.changes import changes

    if runs.finished(folder):
        where = folder.path
        print(f"{where.name} is already finished: {where}\n{outputs.describe(folder)}".rstrip(), file=sys.stderr)
        if found := changes(folder, at_most=LOOKED_INTO_BYTES):
            remedy = "it is not trained again under this name: --run-dir DIR gives it another folder"
            print("\n".join([*(f"  {change}" for change in found), f"  → {remedy}"]), file=sys.stderr)
        return DONE
    code = backends.of(folder).start(folder, detach=detach, after=after, fresh=fresh)
    # None: the run goes on without this process, so there is nothing to report yet.
    if code is None:
        return DONE
    from ftlaunch.report.at_end import leave_report

    leave_report(folder)
    return code


def status(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run's folder or name. Default: all runs.")
    ] = None,
    json: options.Json = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep showing it until it ends, as `ftlaunch watch` does.")
    ] = False,
) -> None:
    """Show the state of a run, or list all runs in ./runs.

    Example: ftlaunch status my-run
    """
    import msgspec

    from ftlaunch.backend import runs
    from ftlaunch.cli.watch import watch as keep_watching
    from ftlaunch.run.changes import changes
    from ftlaunch.watch.status import read_all, read_status

    if watch:
        if json:
            raise UserError("--watch shows runs on the screen, and --json is for programs", "leave one of them out")
        keep_watching([run] if run else None)
        return
    if run is not None:
        folder = runs.find(run)
        # Only for a single run: comparing the data files of every run would make the list slow.
        found = msgspec.structs.replace(read_status(folder), changed=changes(folder, at_most=LOOKED_INTO_BYTES))
        print(text.as_json(found) if json else text.run_status(found))
        return
    every = read_all(runs.all_runs())
    if not every and not json:
        print(f"there are no runs below {runs.HOME.absolute()}", file=sys.stderr)
        return
    print(text.as_json(every) if json else text.run_list(every))


def logs(
    run: options.RunName,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Keep printing new lines until the run ends.")] = False,
    stage: options.StageName = None,
    rank: Annotated[int | None, typer.Option(metavar="K", help="Only rank K.")] = None,
    node: Annotated[str | None, typer.Option(metavar="NAME", help="Only ranks on that node.")] = None,
    first_error: Annotated[bool, typer.Option("--first-error", help="Show the first error in full.")] = False,
    attempt: options.AttemptNumber = None,
) -> None:
    """Print the logs of a run's processes.

    Example: ftlaunch logs -f my-run --rank 0
    """
    from ftlaunch.backend import runs
    from ftlaunch.processes.outcome import describe_failure
    from ftlaunch.watch import logs

    folder = runs.find(run)
    if first_error:
        print(describe_failure(logs.first_error(folder, stage, attempt), in_full=True))
    elif follow:
        with contextlib.suppress(KeyboardInterrupt):  # it stops the following, not the run
            _print(logs.follow(folder, stage, attempt, rank, node))
    else:
        _print(logs.read(folder, stage, attempt, rank, node))


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


def stop(
    run: options.RunName,
    wait: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Wait at most so long for the run to end.")] = 0,
) -> None:
    """Ask a run to save a checkpoint and stop; it can be resumed.

    Example: ftlaunch stop my-run --wait 60
    """
    from ftlaunch.backend import control, runs
    from ftlaunch.watch.status import read_status

    folder = runs.find(run)
    over = control.ask_to_stop(folder, wait)
    now = read_status(folder) if over else None
    if now is not None and now.state == "failed":
        note = next((stage.note for stage in now.stages if stage.state == "failed"), None)
        print(f"{folder.path.name} has ended, and failed on its way: {note}", file=sys.stderr)
        raise typer.Exit(STAGE_FAILED)
    print(f"{folder.path.name} has {'stopped' if over else 'been asked to save and stop'}", file=sys.stderr)


def cancel(run: options.RunName) -> None:
    """End a run at once, without saving.

    Example: ftlaunch cancel my-run
    """
    from ftlaunch.backend import control, runs

    folder = runs.find(run)
    ended = control.cancel(folder)
    print(f"{folder.path.name} {'has been ended' if ended else 'was not running'}", file=sys.stderr)


def resume(
    run: options.RunName,
    settings: options.Settings = None,
    nodes: options.Nodes = None,
    procs_per_node: options.ProcsPerNode = None,
    cluster: options.ClusterName = None,
    site: options.Site = None,
    after: options.After = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Continue although the data or the base have changed since the run began.")
    ] = False,
    detach: options.Detach = False,
) -> None:
    """Continue a run from its newest checkpoint.

    Example: ftlaunch resume my-run --procs-per-node 4 --set parallel.strategy=zero2
    """
    from ftlaunch.backend import backends, runs
    from ftlaunch.backend.replan import replan, save_plan

    folder = runs.find(run)
    runs.require_own(folder)
    # A finished run reads no data any more, so its files may have changed.
    if not runs.finished(folder):
        _mind_changes(folder, accepted=changed)
    backend = backend_named(cluster, site)
    # The run's present backend is asked, before it may move to another: its jobs may still be in the queue.
    backends.of(folder).require_rest(folder)
    if cluster:  # without it, a run goes on where it was
        backends.move(folder, backend)
    if asked := options.all_settings(settings, nodes, procs_per_node):
        # In this order, so that a plan that cannot be started here does not overwrite the one that can.
        planned = replan(folder, asked)
        backends.of(folder).require(planned, after)
        save_plan(folder, planned)
        print(text.summary(planned), file=sys.stderr)
    raise typer.Exit(start(folder, detach=detach, after=after))


def _mind_changes(folder: "RunDir", *, accepted: bool) -> None:
    """Refuse to go on with other data or another base than the run began with, unless that is accepted."""
    from ftlaunch.run import changes

    if not accepted:
        changes.require_unchanged(folder)
        return
    for change in changes.accept(folder):
        print(f"{change}: the run goes on with it as it is", file=sys.stderr)


def drive(run: options.RunName, lock: Annotated[int | None, typer.Option()] = None) -> None:
    """Drive a written run whose lock this process has inherited: what --detach starts."""
    from ftlaunch.backend import backends, runs
    from ftlaunch.report.at_end import leave_report

    folder = runs.find(run)
    # The process that called --detach has left by the end of the run, so the report is written here.
    code = backends.driven(folder).drive(folder, lock)
    leave_report(folder)
    raise typer.Exit(code)
