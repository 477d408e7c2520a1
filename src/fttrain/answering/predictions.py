"""Predictions as a table: a line for each example, with its reference, what every model said and its scores."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ftlaunch.recipe.stages import Need
from ftlaunch.run.files import write_atomic
from fttrain.answering.examination import Exam, Examined
from fttrain.evaluation.scoring import Scored

Models = Mapping[str, tuple[Examined, Scored]]
"""What each model said, and what it scored, by the model's name."""


def write_predictions(path: Path, exam: Exam, models: Models) -> None:
    """Write a .jsonl with a line for each example of each kind that the metrics have looked at."""
    needs = next(iter(models.values()))[0].inputs
    lines = [msgspec.json.encode(line) + b"\n" for need in needs for line in _lines(need, exam, models)]
    write_atomic(path, b"".join(lines))


def _lines(need: Need, exam: Exam, models: Models) -> Iterator[dict[str, Any]]:
    first = next(iter(models.values()))[0].inputs[need]
    for place, reference in enumerate(first.references):
        said = {name: examined.inputs[need].predictions[place] for name, (examined, _) in models.items()}
        scores = {
            name: {key: values[place] for key, values in scored.examples.get(need, {}).items()}
            for name, (_, scored) in models.items()
        }
        if need == "answers":
            yield {"prompt": exam.asked[place].prompt, "references": reference, "answers": said, "scores": scores}
        else:
            yield {"of": need, "reference": reference, "predictions": said, "scores": scores}
