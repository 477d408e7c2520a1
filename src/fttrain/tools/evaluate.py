"""`ftlaunch eval`.

What models answer to a recipe's held-out prompts, and how well, with intervals and differences from the first one.

Each prompt is asked once. What every row with that prompt has for an answer is a reference.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import structs

from ftlaunch.errors import UserError
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.names import label
from ftlaunch.run.records import Gap
from ftlaunch.tools import EvaluateOptions
from fttrain.answering.examination import Exam, Examined, examine, set_exam
from fttrain.answering.generation import Decoding
from fttrain.answering.predictions import write_predictions
from fttrain.evaluation.prompts import data_of
from fttrain.evaluation.scoring import Scored, gaps, load_metric, needs_of, score
from fttrain.tools.chat import load, recorded_dtype
from fttrain.tools.output import run


@dataclass(frozen=True)
class Evaluated:
    """One model's answers."""

    model: str
    exam: Exam
    examined: Examined
    scored: Scored


def main(options: EvaluateOptions) -> Iterator[str]:
    """Yield the scores, those of a model as soon as it has answered."""
    for metric in options.metrics:
        load_metric(metric)  # a wrong name is said before minutes are spent on answers
    name, data = data_of(options.recipe, options.data, needs_of(options.metrics))
    every: list[Evaluated] = []
    width = max(map(len, [*map(label, options.models), "model"]))
    for path in options.models:
        every.append(evaluate(path, data, options))
        # A tokenizer may make rows too long that another keeps; then scores would be of different questions.
        _require_same_rows(every[0], every[-1])
        if options.json:
            continue
        if len(every) == 1:
            cells = [*every[0].scored.scores, *(["words"] if every[0].examined.answers else [])]
            # Told as soon as the first model is done: the next one may take an hour.
            yield f"{_about(name, data, every[0].exam)}\n\n{_line('model', width, *cells)}"
        yield _line(every[-1].model, width, *_cells(every[-1]))
    if options.answers is not None:
        models = {one.model: (one.examined, one.scored) for one in every}
        write_predictions(Path(options.answers), every[0].exam, models)
    if options.json:
        yield json.dumps(_as_json(name, every), indent=2)
    else:
        yield from _differences(every)


def evaluate(path: str, data: Data, options: EvaluateOptions) -> Evaluated:
    """What the model says to the rows held out, or to all where none is.

    Raises UserError where the model or the rows cannot be had.
    """
    model, tokenizer = load(path, dtype=recorded_dtype(options.models))
    exam = set_exam(
        data,
        tokenizer,
        options.recipe.seed,
        needs_of(options.metrics),
        most=options.prompts,
        choices_field=options.choices_field,
        label_field=options.label_field,
    )
    examined = examine(model, tokenizer, exam, Decoding(options.max_new_tokens), with_progress)
    scored = score(options.metrics, examined.inputs, options.resamples, options.recipe.seed)
    return Evaluated(label(path), exam, examined, scored)


def with_progress(items: Sequence[Any], work: Any) -> list[Any]:
    """A `Share` that does all the work itself, and says on stderr how far it has come."""
    done: dict[int, Any] = {}
    for some in work(items):
        done |= some
        print(f"{len(done)} of {len(items)}", file=sys.stderr)
    return [done[place] for place in range(len(items))]


def _require_same_rows(first: Evaluated, other: Evaluated) -> None:
    if [one.references for one in first.exam.asked] != [one.references for one in other.exam.asked]:
        message = f"the tokenizer of {other.model} leaves other rows than that of {first.model}"
        raise UserError(message, "raise max_length of the data, or evaluate them apart")


def _about(name: str, data: Data, exam: Exam) -> str:
    if not exam.asked:
        count = len(exam.references) or len(exam.choices) or len(exam.pairs)
        return f"{name}: {count} rows{' held out' * bool(data.test)}"
    prompts = f"{len(exam.asked)} prompt{'s' * (len(exam.asked) > 1)}{' held out' * bool(data.test)}"
    references = sum(len(one.references) for one in exam.asked)
    seen = sum(one.is_trained for one in exam.asked)
    known = f"\n{seen} of the prompts are trained on, too, in other rows" if seen else ""
    return f"{name}: {prompts}, {references} reference{'s' * (references > 1)}{known}"


def _cells(evaluated: Evaluated) -> list[str]:
    words = [f"{_mean_words(evaluated):.1f}"] if evaluated.examined.answers else []
    return [*(_shown(one.value) for one in evaluated.scored.scores.values()), *words]


def _shown(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def _mean_words(evaluated: Evaluated) -> float:
    answers = evaluated.examined.answers
    return sum(len(text.split()) for text in answers) / max(len(answers), 1)


def _line(model: str, width: int, *cells: str) -> str:
    return "  ".join([f"{model:<{width}}", *(f"{cell:>7}" for cell in cells)])


def _differences(every: list[Evaluated]) -> Iterator[str]:
    """How much each model is above the first, with the 95 % interval of the paired bootstrap."""
    first, *others = every
    for other in others:
        found = gaps(other.scored, first.scored)
        if found:
            told = (f"  {key:<28} {_gap(gap)}" for key, gap in found.items())
            yield "\n".join(["", f"{other.model} against {first.model}, with 95 % intervals over prompts:", *told])


def _gap(gap: Gap) -> str:
    low, high = gap.interval
    verdict = "" if low > 0 or high < 0 else "   no difference that these prompts could show"
    return f"{gap.mean:+.2f} [{low:+.2f}, {high:+.2f}]{verdict}"


def _as_json(name: str, every: list[Evaluated]) -> dict[str, Any]:
    exam = every[0].exam
    return {
        "data": name,
        "prompts": len(exam.asked) or len(exam.references) or len(exam.choices) or len(exam.pairs),
        "references": sum(len(one.references) for one in exam.asked),
        "prompts_trained_on": sum(one.is_trained for one in exam.asked),
        "models": {one.model: _values(one) for one in every},
        "intervals": {one.model: {key: found.interval for key, found in one.scored.scores.items()} for one in every},
        "differences": {
            one.model: {key: structs.asdict(gap) for key, gap in gaps(one.scored, every[0].scored).items()}
            for one in every[1:]
        },
    }


def _values(one: Evaluated) -> dict[str, float]:
    values = {key: found.value for key, found in one.scored.scores.items()}
    return values | ({"words": _mean_words(one)} if one.examined.answers else {})


if __name__ == "__main__":
    run(main, EvaluateOptions)
