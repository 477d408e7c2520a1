"""`ftlaunch eval --task`: tasks of EleutherAI's lm-evaluation-harness, where it is installed.

A thin bridge: models are vetted and loaded as for other verbs, and all else (prompts, scores, errors) is the harness's.
"""

import json
import logging
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ftlaunch.errors import UserError
from ftlaunch.safety import trust
from ftlaunch.tools import HarnessOptions
from fttrain.tools.chat import load, recorded_dtype
from fttrain.tools.output import run

Scores = dict[str, dict[str, tuple[float, float | None]]]
"""Task → score → its value and standard error."""


def main(options: HarnessOptions) -> Iterator[str]:
    """Yield the scores of all models. Raises UserError where the harness is not installed or a task is not known."""
    if find_spec("lm_eval") is None:
        raise UserError("--task needs lm-evaluation-harness, which is not installed", "pip install lm-eval")
    manager = _manager(options)
    every = {path: scores_of(_evaluated(path, manager, options)) for path in options.models}
    yield json.dumps(_as_json(every), indent=2) if options.json else "\n".join(_table(every))


def _manager(options: HarnessOptions) -> Any:
    """Return the harness's list of tasks. Raises UserError where one of those asked for is not among them."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if options.folder is not None:
        trust.require(Path(options.folder), deep=True)  # a task may hold functions
    manager = import_module("lm_eval.tasks").TaskManager(include_path=options.folder)
    if unknown := [task for task in options.tasks if task not in manager.all_tasks]:
        remedy = "see `lm-eval ls tasks`, or name the folder of your own with --task-folder"
        raise UserError(f"lm-evaluation-harness knows no task {', '.join(unknown)}", remedy)
    return manager


def _evaluated(path: str, manager: Any, options: HarnessOptions) -> dict[str, dict[str, Any]]:
    model, tokenizer = load(path, dtype=recorded_dtype(options.models))
    kind = import_module("lm_eval.models.huggingface").HFLM
    wrapped = kind(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
    try:
        found = import_module("lm_eval").simple_evaluate(
            model=wrapped, tasks=list(options.tasks), task_manager=manager, limit=options.prompts, log_samples=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        message = f"lm-evaluation-harness failed: {type(error).__name__}: {error}"
        raise UserError(message, "its tasks may need data of the hub, or packages of their own") from error
    assert found is not None
    return found["results"]


def scores_of(results: dict[str, dict[str, Any]]) -> Scores:
    """Return the scores in the harness's results, whose keys are "acc,none" and "acc_stderr,none"."""
    found: Scores = {}
    for task, values in results.items():
        for key, value in values.items():
            score, comma, way = key.partition(",")
            # Keys without a comma, such as "alias", are no scores.
            if not comma or score.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{score}_stderr,{way}")
            name = score if way == "none" else f"{score} ({way})"
            found.setdefault(task, {})[name] = (value, error if isinstance(error, float) else None)
    return found


def _table(every: dict[str, Scores]) -> Iterator[str]:
    """Return a line for each score, with a column for each model."""
    heads = ["task", "score", *every]
    first = next(iter(every.values()))
    rows = [
        [task, score, *(_shown(*scores[task][score]) for scores in every.values())]
        for task, values in first.items()
        for score in values
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in [heads, *rows]:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def _shown(value: float, error: float | None) -> str:
    return f"{value:.4g}" + (f" ± {error:.2g}" if error is not None else "")


def _as_json(every: dict[str, Scores]) -> dict[str, Any]:
    def part(place: int) -> dict[str, Any]:
        return {
            path: {task: {score: one[place] for score, one in values.items()} for task, values in scores.items()}
            for path, scores in every.items()
        }

    return {"models": part(0), "standard_errors": part(1)}


if __name__ == "__main__":
    run(main, HarnessOptions)
