"""`opt_trace.json`: the curves of a run's last SFT stage in a few lists, and what was measured after training."""

from typing import Any

from msgspec import UNSET

from ftlaunch.report.curves import perplexity
from ftlaunch.report.facts import RunFacts, StageFacts
from ftlaunch.run.records import EvaluationResult

AFTER = {
    "post_train_token_position_match": "token_position_match",
    "post_train_rouge_1": "rouge1",
    "post_train_rouge_2": "rouge2",
    "post_train_rouge_L": "rougeL",
    "post_train_rouge_Lsum": "rougeLsum",
    "post_train_answer_words": "answer_words",
}
"""Keys of the trace → those of an evaluate stage's scores."""


def trace(run: RunFacts) -> dict[str, Any] | None:
    """The trace; None where nothing was trained. Times are in minutes, scores are null where nothing was evaluated.

    A point is an evaluation, or every optimizer step where rows were never evaluated.
    """
    stage = next((one for one in reversed(run.stages) if one.kind == "sft" and one.trained), None)
    if stage is None:
        return None
    evaluation = next((one for one in reversed(run.stages) if one.kind == "evaluate"), None)
    told = evaluation.result if evaluation else None
    scores: dict[str, float | None] = {}
    if isinstance(told, EvaluationResult):
        # UNSET stands for an evaluation that asked for no answers; empty ones have 0.0 words.
        scores = told.scores | {"answer_words": None if told.answer_words is UNSET else told.answer_words}
    return {
        "logging_strategy": "steps",
        **_curves(stage),
        **{key: scores.get(name) for key, name in AFTER.items()},
        "train_time": stage.seconds / 60,
        "test_time": evaluation.seconds / 60 if evaluation else None,
    }


def _curves(stage: StageFacts) -> dict[str, list[Any]]:
    tested: dict[int, Any] = {line["step"]: dict(line)["eval/loss"] for line in stage.evaluated if "eval/loss" in line}
    trained = {line["step"]: line.get("loss") for line in stage.trained}
    steps = sorted(tested) or sorted(trained)
    train, test = [trained.get(step) for step in steps], [tested.get(step) for step in steps]
    return {
        "steps_or_epochs": steps,
        "train_loss": train,
        "test_loss": test,
        "train_perplexity": list(map(perplexity, train)),
        "test_perplexity": list(map(perplexity, test)),
    }
