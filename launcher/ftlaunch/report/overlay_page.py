"""The page of several runs: what differs between them, what came of it, and their curves over each other."""

from collections.abc import Sequence
from statistics import median

import msgspec

from ftlaunch.compare.measures import seconds_a_step
from ftlaunch.report import curves
from ftlaunch.report.curves import Chart, Series
from ftlaunch.report.facts import RunFacts, StageFacts, flattened, last_shared_training
from ftlaunch.report.markup import escape, page, section, table
from ftlaunch.report.run_page import state
from ftlaunch.report.svg import draw, number
from ftlaunch.run.progress import duration
from ftlaunch.run.records import TrainingResult

MISSING = "–"


def overlay_page(runs: Sequence[RunFacts]) -> str:
    """The whole page, complete in itself."""
    names = unique_names(runs)
    heads = "".join(
        f"<p>{escape(name)} {state(run.state)} <span class='soft'>{escape(run.path)}</span></p>"
        for name, run in zip(names, runs, strict=True)
    )
    charts = [
        section(stage, f'<div class="charts">{"".join(map(draw, drawn))}</div>')
        for stage, drawn in curves.overlaid(runs, names).items()
    ]
    body = [
        f"<header><h1>{len(runs)} runs</h1>{heads}</header>",
        section("What came of them", _outcomes(runs, names), _trade_offs(runs, names)),
        section("What differs", _differences(runs, names)),
        *charts,
    ]
    return page(f"{', '.join(names)} – ftlaunch", "".join(body))


def unique_names(runs: Sequence[RunFacts]) -> list[str]:
    """The runs' names; those that several share have as much of the path before them as tells them apart."""
    depth = 1
    while True:
        names = ["/".join(run.path.parts[-depth:]) for run in runs]
        # A run that is named twice has the same path throughout; the bound on depth ends the loop then.
        if len(set(names)) == len(names) or depth >= max(len(run.path.parts) for run in runs):
            return names
        depth += 1


def _outcomes(runs: Sequence[RunFacts], names: Sequence[str]) -> str:
    """A line a run: what its stage of the last training that all have begun says, and what it has taken."""
    stages = last_shared_training(runs)
    times = [{"time of all stages": duration(sum(stage.seconds for stage in run.stages))} for run in runs]
    told = [_measures(stage) | time for stage, time in zip(stages, times, strict=True)] if stages else times
    keys = list(dict.fromkeys(key for measures in told for key in measures))
    rows = [(name, *(measures.get(key) for key in keys)) for name, measures in zip(names, told, strict=True)]
    of = f"<p>Of {escape(stages[0].status.name)}, the last training that all have begun:</p>" if stages else ""
    return of + table(("run", *keys), rows, wide=True)


def _measures(stage: StageFacts) -> dict[str, str]:
    trained = stage.result.trained_parameters if isinstance(stage.result, TrainingResult) else 0
    return {
        "step": f"{stage.trained[-1]['step']} of {stage.trained[-1].get('steps', '?')}",
        **{key: number(value) for key, value in quality(stage).items()},
        "seconds a step": number(pace(stage)),
        "memory": f"{memory(stage):.2f} GB",
        "trained parameters": f"{trained:,}",
        "weights": f"{stage.model_bytes / 1e6:,.2f} MB",
    }


def quality(stage: StageFacts) -> dict[str, float]:
    """What a stage said last of the rows held out; its loss where it held none out."""
    held_out = stage.evaluated[-1] if stage.evaluated else stage.trained[-1]
    wanted = [key for key in held_out if key.startswith("eval/")] or ["loss"]
    return {key: held_out[key] for key in wanted if isinstance(held_out.get(key), int | float)}


def pace(stage: StageFacts) -> float:
    """Median seconds of an optimizer step; 0 where that is not known."""
    seconds = seconds_a_step(stage.trained)
    return median(seconds) if seconds else 0.0


def memory(stage: StageFacts) -> float:
    """Peak memory in GB; 0 where it is not known."""
    return max(line.get("peak_memory_bytes", 0) for line in stage.trained) / 1e9


def _trade_offs(runs: Sequence[RunFacts], names: Sequence[str]) -> str:
    """The quality that all runs have, against what a step takes in time and memory."""
    stages = last_shared_training(runs)
    qualities = [quality(stage) for stage in stages]
    shared = [key for key in qualities[0] if all(key in one for one in qualities)] if qualities else []
    if not shared:
        return ""
    values = [one[shared[0]] for one in qualities]
    charts = [
        Chart(
            title=f"{shared[0]} against {label}",
            x_label=label,
            dots=True,
            series=[
                Series(name, [(cost(stage), value)]) for name, stage, value in zip(names, stages, values, strict=True)
            ],
        )
        for label, cost in (("seconds a step", pace), ("peak memory in GB", memory))
    ]
    return f'<div class="charts">{"".join(map(draw, charts))}</div>'


def _differences(runs: Sequence[RunFacts], names: Sequence[str]) -> str:
    """Keys whose values are not the same in all runs."""
    told = [flattened(msgspec.to_builtins(run.recipe)) for run in runs]
    keys = dict.fromkeys(key for values in told for key in values)
    rows = [(key, *(values.get(key, MISSING) for values in told)) for key in keys]
    # repr(): values may be lists, which cannot be in a set, and True must differ from 1.
    differing = [row for row in rows if len(set(map(repr, row[1:]))) > 1]
    return table(("key", *names), differing, wide=True) or "<p>Nothing: their recipes say the same.</p>"
