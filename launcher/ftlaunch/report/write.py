"""Reports on disk: `report/` in a run's folder, or one of several runs where the user wants it."""

from collections.abc import Sequence
from pathlib import Path

from ftlaunch.report import curves, plots
from ftlaunch.report.facts import RunFacts, read_run
from ftlaunch.report.overlay_page import overlay_page
from ftlaunch.report.run_page import run_page
from ftlaunch.report.trace import trace
from ftlaunch.run.files import write_atomic, write_json
from ftlaunch.run.layout import RunDir

PAGE = "index.html"


def write_report(run: RunDir, folder: Path | None = None, *, with_plots: bool) -> Path:
    """Write a run's page, opt_trace.json and, if asked and matplotlib is there, its plots; the page's path.

    `folder` is the run's own `report` where none is given. UserError where the run cannot be read.
    """
    facts = read_run(run)
    folder = _made(folder or run.report)
    page = folder / PAGE
    write_atomic(page, run_page(facts))
    if (told := trace(facts)) is not None:
        write_json(folder / "opt_trace.json", told)
    if with_plots and plots.can_plot():
        for stage in facts.stages:
            plots.write_plots(curves.of_stage(stage), _made(folder / "plots"), stage.status.name)
    return page


def write_overlay(runs: Sequence[RunDir], folder: Path) -> Path:
    """Write one page about several runs; its path. UserError where one of them cannot be read."""
    facts: list[RunFacts] = [read_run(run) for run in runs]
    page = _made(folder) / PAGE
    write_atomic(page, overlay_page(facts))
    return page


def _made(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
