"""The page of one run."""

import time
from collections.abc import Iterator
from typing import Any, cast

from ftlaunch.report import curves
from ftlaunch.report.facts import AttemptFacts, RunFacts, StageFacts, changed_keys, flattened, last_shared_training
from ftlaunch.report.markup import escape, folded, page, pairs, section, table
from ftlaunch.report.svg import draw, number
from ftlaunch.run.outputs import describe_merge
from ftlaunch.run.progress import duration
from ftlaunch.run.records import Counts, EvaluationResult, Interval, MergeResult, TrainingResult


def run_page(run: RunFacts) -> str:
    """The whole page, complete in itself."""
    body = [
        f"<header><h1>{escape(run.name)} {state(run.state)}</h1>"
        f'<p class="soft">{escape(run.path)}<br>as of {_clock(time.time())}</p></header>',
        _cards(run),
        *(_stage(stage) for stage in run.stages),
        section("What differs from the defaults", _changes(run)),
        section("Where it comes from", _provenance(run)),
    ]
    return page(f"{run.name} – ftlaunch", "".join(body))


def state(name: str) -> str:
    """A state as a small label."""
    return f'<span class="state {escape(name)}">{escape(name)}</span>'


def _cards(run: RunFacts) -> str:
    facts = (*_quality(run), *_cost(run))
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for label, value in facts)
    return f'<div class="cards">{cells}</div>'


def _quality(run: RunFacts) -> Iterator[tuple[str, str]]:
    found = last_shared_training([run])
    if not found:
        return
    last = found[0]
    yield "optimizer steps", f"{last.trained[-1]['step']} of {last.trained[-1].get('steps', '?')}"
    # Later lines overwrite earlier ones, which leaves the newest value of each key.
    newest = {key: value for line in [*last.trained, *last.evaluated] for key, value in line.items()}
    for key, label in (
        ("loss", "loss in the last step"),
        ("eval/loss", "loss held out"),
        ("eval/perplexity", "perplexity held out"),
        ("eval/rewards/accuracy", "reward accuracy held out"),
        ("reward", "mean reward"),
    ):
        if isinstance(value := newest.get(key), int | float):
            yield label, number(value)


def _cost(run: RunFacts) -> Iterator[tuple[str, str]]:
    yield "time in attempts", duration(sum(stage.seconds for stage in run.stages))
    steps = [line for stage in run.stages for line in stage.trained]
    memory = [line["peak_memory_bytes"] for line in steps if "peak_memory_bytes" in line]
    if memory:
        yield "peak memory", f"{max(memory) / 1e9:.2f} GB"
    tokens = sum(stage.trained[-1].get("tokens", 0) for stage in run.stages if stage.trained)
    if tokens:
        yield "tokens trained on", f"{tokens:,}"


def _stage(stage: StageFacts) -> str:
    status = stage.status
    note = f'<p class="failed">{escape(status.note)}</p>' if status.note else ""
    drawn = "".join(draw(chart) for chart in curves.of_stage(stage))
    charts = f'<div class="charts">{drawn}</div>' if drawn else ""
    return (
        f'<section id="{escape(status.name)}"><h2>{escape(status.name)} {state(status.state)}</h2>{note}'
        + pairs([*stage.notes.items(), *_layout(stage)])
        + charts
        + section("Attempts", _attempts(stage.attempts), level=3)
        + section("Scores", _scores(stage), level=3)
        + section("What was answered", "".join(map(_sample, stage.predictions)), _drawn(stage), level=3)
        + section("Against the adapter model", _merge_check(stage), level=3)
        + section("Rows", _rows(stage), level=3)
        + section("Steps left out", _skipped(stage), level=3)
        + folded("What the stage left in result.json", _values(stage.left))
        + "</section>"
    )


def _layout(stage: StageFacts) -> Iterator[tuple[str, str]]:
    """The layout in which rows were computed, and how well that agreed with the model's own forward pass."""
    verdict = stage.verdict
    layout = {"alone": "each row by itself"}.get(verdict.get("layout", ""), verdict.get("layout", ""))
    if not verdict.get("differences"):
        yield from [("rows computed", layout)] if layout else []
        return
    # The trials of layouts that were given up differ by more, and are told by the warnings.
    tried = {"head", "adapter", verdict["layout"], *(["shared"] if verdict["share_prompt"] else [])}
    largest = max(value for name, value in verdict["differences"].items() if name in tried)
    agrees = f"within {largest:.1e} nats per token of the model's own forward pass ({verdict['bound']:.1e} allowed)"
    yield "rows computed", f"{layout}; {agrees}"
    for warning in verdict["warnings"]:
        yield "warning", warning


def _attempts(attempts: list[AttemptFacts]) -> str:
    rows = [
        (
            one.number,
            _clock(one.began) if one.began else None,
            duration(one.ended - one.began) if one.began and one.ended else None,
            one.outcome,
            one.cause,
        )
        for one in attempts
    ]
    return table(("attempt", "began", "took", "ended as", "because"), rows)


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _merge_check(stage: StageFacts) -> str:
    return f"<p>{escape(describe_merge(stage.result))}</p>" if isinstance(stage.result, MergeResult) else ""


def _scores(stage: StageFacts) -> str:
    """The scores of an evaluate stage, each with its 95 % interval, next to those of the base."""
    result = stage.result
    if not isinstance(result, EvaluationResult):
        return ""
    before, gaps = result.base_scores or {}, result.differences or {}
    rows = [
        (
            key,
            _score(value),
            _interval(result.intervals.get(key)),
            _score(before[key]) if key in before else None,
            f"{number(gaps[key].mean)} {_interval(gaps[key].interval)}" if key in gaps else None,
        )
        for key, value in result.scores.items()
    ]
    return table(("score", "value", "95 % interval", "the base", "difference, with its interval"), rows)


def _score(value: float | None) -> str:
    return "not finite" if value is None else number(value)


def _interval(bounds: Interval | None) -> str:
    return f"[{number(bounds[0])}, {number(bounds[1])}]" if bounds else ""


def _sample(line: dict[str, Any]) -> str:
    """One prompt with its references and what each model said."""
    if "prompt" not in line:
        return ""
    said = [(f"answer, {name}", text) for name, text in line["answers"].items()]
    return pairs([("prompt", line["prompt"]), ("reference", " | ".join(line["references"])), *said])


def _drawn(stage: StageFacts) -> str:
    """Answers in training: the first ones, and the newest."""
    samples = [cast("dict[str, Any]", entry) for entry in stage.drawn]
    rows = [(one["step"], one["prompt"], one["answer"], _plain(one.get("reward"))) for one in samples]
    return table(("step", "prompt", "answer", "reward"), rows)


def _rows(stage: StageFacts) -> str:
    """What became of the rows of each data set, with the reasons why some were left out, and the first of these."""
    found = stage.result.data if isinstance(stage.result, TrainingResult) else {}
    heads = ("data", "rows", "kept", "tokens", "trained tokens", "cut short", "left out")
    kept = [
        (name, *map(_plain, (one.rows, one.kept, one.tokens, one.trained, one.truncated)), _why(one))
        for name, one in found.items()
    ]
    examples = [example for counts in found.values() for example in counts.examples]
    return table(heads, kept) + folded("The first rows left out", table(("row",), [(one,) for one in examples]))


def _why(counts: Counts) -> str:
    """The reasons for which rows were left out, each with how many."""
    # `|` makes a new dict, so the line below does not change the result that others read.
    reasons = counts.unfit | counts.excused
    if counts.dropped_untrained:
        reasons["nothing in them is trained"] = counts.dropped_untrained
    return "; ".join(f"{count:,}: {reason}" for reason, count in reasons.items())


def _skipped(stage: StageFacts) -> str:
    rows = [(line["step"], line.get("rewound_to")) for line in stage.trained if line.get("skipped")]
    return table(("step", "went back to the checkpoint of step"), rows)


def _values(nested: dict[str, Any]) -> str:
    """Every value of a nested table under its key path; empty where nothing is in it."""
    return pairs([(key, _plain(value)) for key, value in flattened(nested).items()]) if nested else ""


def _plain(value: Any) -> str:
    match value:
        case None:
            return "none"
        # Before int(), of which True and False are instances, too.
        case bool():
            return str(value).lower()
        case int():
            return f"{value:,}"
        case float():
            return number(value)
        case list():
            return ", ".join(_plain(each) for each in cast("list[Any]", value))
        case _:
            return str(value)


def _changes(run: RunFacts) -> str:
    rows = [
        (key, _plain(value), "" if default is None else _plain(default))
        for key, (value, default) in changed_keys(run.recipe).items()
    ]
    return table(("key", "value", "default"), rows)


def _provenance(run: RunFacts) -> str:
    told = dict(run.provenance)
    packages, data = told.pop("packages", {}), told.pop("data", {})
    return (
        _values(told) + folded("Packages", _values(packages)) + folded("Data files, with their SHA-256", _values(data))
    )
