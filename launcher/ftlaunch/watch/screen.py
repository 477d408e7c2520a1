"""What `ftlaunch watch` shows: every stage of runs on one screen, with what was measured and what was said last."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

from ftlaunch.backend.status import RunStatus, StageStatus
from ftlaunch.run.files import last_lines, read_jsonl
from ftlaunch.run.layout import RunDir, StageDir
from ftlaunch.run.pace import read_pace
from ftlaunch.run.progress import Entry, MetricsTail, duration, is_evaluation, newest, seconds_left
from ftlaunch.run.records import EvaluationResult, read_result

if TYPE_CHECKING:
    from rich.console import RenderableType

BLOCKS = "▁▂▃▄▅▆▇█"
SPARKS = 48
"""Characters of a curve."""
KEPT = 2000
"""Optimizer steps whose losses are kept for the curve."""
LAST_LINES = 64
"""Lines of a log among which the last one is looked for that tells something: stacks and warnings are long."""
SAID = 80
"""Characters of a sample's prompt, and of its answer."""
WARNING = re.compile(r"^\S+:\d+: \w*Warning: ")
"""Lines by which libraries warn their own developers: where it was. The source line follows."""
STACK = re.compile(r'^File "|^(Current t|T)hread 0x')
"""Lines of the stacks that a rank is asked for when it hangs."""
STYLES = {"done": "green", "running": "cyan", "failed": "red", "waiting": "dim", "queued": "yellow"}


class StageTail:
    """A stage's metrics as they grow, also where they are cut back because a stage goes on from a checkpoint."""

    def __init__(self, folder: StageDir) -> None:
        self.folder = folder
        self._tail = MetricsTail(folder.metrics)
        self.steps: list[Entry] = []
        """Optimizer steps in order, each once."""
        self.evaluation: Entry | None = None
        """The newest."""

    def read(self) -> None:
        """Take in what is new."""
        while entries := self._tail.read():
            for entry in entries:
                self._take(entry)
        del self.steps[:-KEPT]

    def _take(self, entry: Entry) -> None:
        if "step" not in entry:
            return
        if is_evaluation(entry):
            self.evaluation = entry
            return
        # Training went on from a checkpoint and takes the steps after it again: their first versions do not count.
        while self.steps and self.steps[-1]["step"] >= entry["step"]:
            self.steps.pop()
        self.steps.append(entry)


class RunTail:
    """A run's stages as they go."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.stages = {folder.name: StageTail(folder) for folder in run.stage_dirs()}

    def read(self) -> None:
        for stage in self.stages.values():
            stage.read()


def screen(statuses: Sequence[RunStatus], tails: Sequence[RunTail]) -> "RenderableType":
    """All runs below each other."""
    from rich.console import Group

    return Group(*(_run(status, tail) for status, tail in zip(statuses, tails, strict=True)))


def _run(status: RunStatus, tail: RunTail) -> "RenderableType":
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for _ in range(3):
        grid.add_column(overflow="fold")
    for stage in status.stages:
        style = STYLES.get(stage.state, "yellow")
        told = "\n".join(stage_lines(stage, tail.stages[stage.name]))
        grid.add_row(Text(stage.name), Text(stage.state, style=style), Text(told))
    title = Text.assemble((status.name, "bold"), " ", (status.state, STYLES.get(status.state, "yellow")))
    return Panel(grid, title=title, title_align="left", subtitle=Text(status.path, style="dim"), subtitle_align="left")


def stage_lines(status: StageStatus, tail: StageTail) -> list[str]:
    """Return the lines about a stage."""
    lines: list[str] = []
    if tail.steps:
        lines += [_progress(status, tail), f"{sparkline([entry.get('loss') for entry in tail.steps])}  {_newest(tail)}"]
    if status.state == "running" and (pace := read_pace(tail.folder)) and (ranks := pace.by_rank()):
        lines.append(ranks)
    if tail.evaluation:
        told = [f"{key} {value:.4g}" for key, value in tail.evaluation.items() if key.startswith("eval/")]
        lines.append(f"step {tail.evaluation['step']}: {'  '.join(told)}")
    if scores := _scores(tail.folder):
        lines.append(scores)
    if sample := _sample(tail.folder):
        lines.append(sample)
    lines += [*([status.note] if status.note else []), *status.warnings]
    if status.state in ("running", "failed", "interrupted") and (said := last_line(tail.folder)):
        lines.append(f"rank 0 said: {said}")
    return lines


def _scores(folder: StageDir) -> str:
    """What an evaluate stage has found; empty elsewhere, and before it has."""
    result = read_result(folder.result, folder.kind)
    scores = result.scores if isinstance(result, EvaluationResult) else {}
    told = {key: "not finite" if value is None else f"{value:.4g}" for key, value in scores.items()}
    return "  ".join(f"{key} {value}" for key, value in told.items())


def _sample(folder: StageDir) -> str:
    """The newest answer that training has left, or the first of an evaluate stage; empty where there is none."""
    if drawn := newest(folder.samples):
        sample = cast("dict[str, Any]", drawn[-1])
        reward = sample.get("reward")
        told = f"  (step {sample['step']}{f', reward {reward:.3g}' if isinstance(reward, float) else ''})"
        return f"sample: {_short(sample['prompt'])} → {_short(sample['answer'])}{told}"
    predicted = next(read_jsonl(folder.predictions), None)
    if predicted is None or "prompt" not in predicted:
        return ""
    return f"sample: {_short(predicted['prompt'])} → {_short(next(iter(predicted['answers'].values())))}"


def _short(text: str) -> str:
    """The beginning of a text in one line. A model may say control characters, which a terminal would obey."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= SAID else f"{line[: SAID - 1]}…"


def _progress(status: StageStatus, tail: StageTail) -> str:
    newest = tail.steps[-1]
    step, steps = newest["step"], newest.get("steps")
    parts = [f"step {step}/{steps}  {_bar(step / steps)}" if steps else f"step {step}"]
    left = seconds_left(tail.steps) if status.state == "running" else None
    parts += [f"{duration(left)} left"] if left is not None else []
    parts += [f"attempt {status.attempts}"] if status.attempts > 1 else []
    return "  ".join(parts)


def _bar(share: float) -> str:
    done = round(min(max(share, 0.0), 1.0) * 24)
    return "━" * done + "╌" * (24 - done)


def _newest(tail: StageTail) -> str:
    """The newest step's loss, speed, memory, learning rate and steps left out."""
    newest = tail.steps[-1]
    loss = newest.get("loss")
    parts = ["loss not finite" if loss is None else f"loss {loss:.4f}"]
    # A stage without a key shows nothing for it: accuracy is measured on pairs, reward and KL by PPO.
    for key, told in (
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("peak_memory_bytes", "{:.2f} GB"),
        ("learning_rate", "rate {:.3g}"),
        ("grad_norm", "|grad| {:.3g}"),
        ("rewards/accuracy", "rewards right {:.0%}"),
        ("reward", "reward {:.3g}"),
        ("kl", "KL {:.3g}"),
    ):
        value = newest.get(key)
        if isinstance(value, int | float):
            parts.append(told.format(value / 1e9 if key == "peak_memory_bytes" else value))
    skipped = sum(bool(entry.get("skipped")) for entry in tail.steps)
    return "  ".join([*parts, *([f"{skipped} steps left out"] if skipped else [])])


def sparkline(values: Sequence[float | None], width: int = SPARKS) -> str:
    """The course of values in few characters, each the mean of a stretch; a stretch without a finite one is a blank."""
    size = max(1, math.ceil(len(values) / width))
    stretches = [values[start : start + size] for start in range(0, len(values), size)]
    kept = [[value for value in stretch if value is not None and math.isfinite(value)] for stretch in stretches]
    means = [fmean(values) if values else None for values in kept]
    finite = [mean for mean in means if mean is not None]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    # A flat curve has no range to divide by; with 1.0 all of its blocks are the lowest.
    room = (high - low) or 1.0
    top = len(BLOCKS) - 1
    return "".join(" " if mean is None else BLOCKS[round((mean - low) / room * top)] for mean in means)


def last_line(folder: StageDir) -> str:
    """What rank 0 of the newest attempt said last; empty where it has said nothing."""
    attempts = folder.all_attempts()
    text = last_lines(attempts[-1].rank_log(0), LAST_LINES) if attempts else ""
    # A progress bar rewrites its line by "\r", at which splitlines() splits as well.
    lines = ["", *(line.strip() for line in text.splitlines())]
    said = [line for before, line in pairwise(lines) if not WARNING.search(before) and not WARNING.search(line)]
    return next((line[:200] for line in reversed(said) if line and not STACK.search(line)), "")
