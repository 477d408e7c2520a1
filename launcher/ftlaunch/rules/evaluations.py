"""Rules of the evaluations that training stages make on their way: their rows, metrics of answers, and the best one."""

from collections.abc import Callable, Iterator
from pathlib import Path

from ftlaunch.errors import Problem, UserError
from ftlaunch.load.messages import as_toml, did_you_mean, join_or
from ftlaunch.recipe.stages import METRICS, SCORES, Ppo
from ftlaunch.rows.conversations import PAIRED
from ftlaunch.rules.stage import TrainedStage
from ftlaunch.safety import trust


def evaluations_have_rows(training: TrainedStage) -> Iterator[Problem]:
    if not training.data or any(data.test or data.eval for data in training.data):
        return
    name = training.stage.data_names[0]
    for key in ("evaluate_every", "eval_metrics", "best_by"):
        if getattr(training.stage, key):
            remedy = f"hold rows out with data.{name}.test, name some with data.{name}.eval, or remove {key}"
            yield training.problem(key, "has no rows to evaluate on: none of its data has test rows", remedy)


def metrics_are_of_answers(training: TrainedStage) -> Iterator[Problem]:
    stage = training.stage
    if stage.eval_metrics and stage.has_head:
        whose = "PPO evaluates its answers by their reward" if isinstance(stage, Ppo) else "a reward model gives none"
        yield training.problem("eval_metrics", f"are of answers, and {whose}", "remove it, or add an evaluate stage")
        return
    for metric in dict.fromkeys(stage.eval_metrics):
        if METRICS.get(metric, "answers") != "answers":
            message = f"{as_toml(metric)} is of no answers, and a stage that trains has only those scored on its way"
            yield training.problem("eval_metrics", message, "name it in an evaluate stage")
        elif stage.eval_metrics.count(metric) > 1:
            message = f"names {as_toml(metric)} {stage.eval_metrics.count(metric)} times"
            yield training.problem("eval_metrics", message, "name it once")
        try:
            if Path(metric).is_absolute():
                trust.require(Path(metric))  # a metric of one's own is a program
        except UserError as error:
            yield training.problem("eval_metrics", error.message, error.remedy)


def answers_can_be_compared(training: TrainedStage) -> Iterator[Problem]:
    if not training.stage.eval_metrics or training.stage.has_head:
        return
    for table in training.data_tables:
        why = None
        if table.format == "text":
            why = "holds plain text, which asks nothing"
        elif table.data.train_on != "answer" and table.format not in PAIRED:
            why = f"has train_on = {as_toml(table.data.train_on)}, and only last answers can be compared"
        elif table.data.streaming:
            why = "is streamed, and rows whose answers are scored are read at once"
        if why is not None:
            message = f"[data.{table.name}] {why}"
            yield training.problem("eval_metrics", message, "remove it, or evaluate another table in an evaluate stage")


def limits_are_of_answers(training: TrainedStage) -> Iterator[Problem]:
    for key in ("eval_prompts", "eval_max_new_tokens", "eval_temperature", "eval_beams"):
        if getattr(training.stage, key) is not None and not training.stage.eval_metrics:
            yield training.problem(key, "counts only with eval_metrics", 'remove it, or add eval_metrics = ["rouge"]')


def answers_are_of_one_kind(training: TrainedStage) -> Iterator[Problem]:
    if (training.stage.eval_beams or 1) > 1 and training.stage.eval_temperature:
        message = "searches for the likeliest answer, and eval_temperature draws one"
        yield training.problem("eval_beams", message, "remove one of them")


def best_is_told(training: TrainedStage) -> Iterator[Problem]:
    stage = training.stage
    if stage.best_by is None:
        return
    known = [*stage.evaluated, *(score for metric in stage.eval_metrics for score in SCORES.get(metric, ()))]
    if stage.best_by not in known:
        metric = next((metric for metric, scores in SCORES.items() if stage.best_by in scores), None)
        remedy = f"write one of {join_or(map(as_toml, known))}"
        if metric is not None and not stage.has_head:
            remedy = f"add {as_toml(metric)} to eval_metrics, or {remedy}"
        message = f"{as_toml(stage.best_by)} is no score of the stage's evaluations of which it is known what is better"
        yield training.problem("best_by", message, did_you_mean(stage.best_by, known, remedy))
    elif stage.evaluate_every is None:
        message = "chooses among evaluations, and the only one is at the end"
        yield training.problem("best_by", message, "add evaluate_every = …, or remove it")


RULES: tuple[Callable[[TrainedStage], Iterator[Problem]], ...] = (
    evaluations_have_rows,
    metrics_are_of_answers,
    answers_can_be_compared,
    limits_are_of_answers,
    answers_are_of_one_kind,
    best_is_told,
)
