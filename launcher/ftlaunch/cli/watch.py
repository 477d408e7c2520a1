"""The verb that keeps runs on the screen while they go."""

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from ftlaunch.run.layout import RunDir
    from ftlaunch.watch.screen import RunTail

GOES_ON = ("running", "queued", "unknown")
"""States of runs that there is something to see of."""
SECONDS = 1.0
"""Between two looks at runs that disturb nobody."""


def watch(
    run: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN…]", help="Folders or names of runs. Default: all that are running."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Show them once, and exit.")] = False,
) -> None:
    """Show runs live until they end; Ctrl-C only stops watching.

    Example: ftlaunch watch my-run other-run
    """
    from rich.console import Console

    from ftlaunch.backend import runs
    from ftlaunch.watch.screen import RunTail

    found = [runs.find(name) for name in run] if run else _under_way()
    if not found:
        print(f"no run below {runs.HOME.absolute()} is under way; name one to see how it stands", file=sys.stderr)
        return
    console = Console(highlight=False, markup=False, emoji=False)
    tails = [RunTail(one) for one in found]
    # In a pipe or a file, every redraw would be another copy of the screen.
    if once or not sys.stdout.isatty():
        console.print(_look(tails)[0])
        return
    with contextlib.suppress(KeyboardInterrupt):
        _follow(console, tails)


def _under_way() -> "list[RunDir]":
    """The runs below ./runs that work now, or wait for a machine."""
    from ftlaunch.backend import runs
    from ftlaunch.watch.status import read_all

    every = runs.all_runs()
    return [run for run, status in zip(every, read_all(every), strict=True) if status.state in GOES_ON]


def _follow(console: "Console", tails: "list[RunTail]") -> None:
    from rich.live import Live

    from ftlaunch.backend import backends

    # One look asks for all runs, so the backend that needs the longest pause sets the pace.
    pause = max(SECONDS, *(backends.of(tail.run).patience for tail in tails))
    shown, is_over = _look(tails)
    with Live(shown, console=console, auto_refresh=False) as live:
        while not is_over:
            time.sleep(pause)
            shown, is_over = _look(tails)
            live.update(shown, refresh=True)


def _look(tails: "list[RunTail]") -> "tuple[RenderableType, bool]":
    """How runs stand now, and whether none of them works any more."""
    from ftlaunch.watch.screen import screen
    from ftlaunch.watch.status import read_all

    statuses = read_all([tail.run for tail in tails])
    for tail in tails:
        tail.read()
    works = any(status.state in GOES_ON for status in statuses)
    return screen(statuses, tails), not works
