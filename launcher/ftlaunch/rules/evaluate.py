"""Rules of evaluate stages: their data, what their metrics need of it, and how answers are made."""

from collections.abc import Callable, Iterator
from pathlib import Path

from ftlaunch.errors import Problem, UserError
from ftlaunch.load import Loaded
from ftlaunch.load.messages import as_toml, did_you_mean, join_or
from ftlaunch.plan import resolve
from ftlaunch.recipe.stages import METRICS, Evaluate, Reward
from ftlaunch.rows.conversations import PAIRED
from ftlaunch.rules.data import DataTable
from ftlaunch.rules.stage import JudgedStage
from ftlaunch.safety import trust


class EvaluateStage(JudgedStage, frozen=True):
    """An evaluate stage of a recipe."""

    stage: Evaluate

    @property
    def table(self) -> DataTable | None:
        """Its data; None where there is no such table."""
        data = self.loaded.recipe.data.get(self.stage.data)
        return None if data is None else DataTable(self.loaded, self.stage.data, data)

    @property
    def needs(self) -> dict[str, str]:
        """What metrics have to be given → the first metric that does."""
        needs: dict[str, str] = {}
        for metric in self.stage.metrics:
            # A metric that is not ours is a program that compares answers.
            needs.setdefault(METRICS.get(metric, "answers"), metric)
        return needs


def evaluate_stages(loaded: Loaded) -> Iterator[EvaluateStage]:
    """The recipe's evaluate stages."""
    for one in resolve.resolve(loaded.recipe):
        if isinstance(one.stage, Evaluate):
            yield EvaluateStage(loaded, one, one.stage)


def data_is_known(evaluation: EvaluateStage) -> Iterator[Problem]:
    known, name = list(evaluation.loaded.recipe.data), evaluation.stage.data
    if evaluation.table is None:
        remedy = f"name {join_or(known)}" if known else f"add a table headed [data.{name}]"
        yield evaluation.problem("data", f"there is no table [data.{name}]", did_you_mean(name, known, remedy))


def data_suits_metrics(evaluation: EvaluateStage) -> Iterator[Problem]:
    table, needs = evaluation.table, evaluation.needs
    if table is None or table.format is None:
        return
    if "pairs" in needs and len(needs) > 1:
        others = [metric for metric in evaluation.stage.metrics if METRICS.get(metric) != "pairs"]
        message = f"{needs['pairs']} needs pairs of answers, and {join_or(map(as_toml, others))} prompts with answers"
        yield evaluation.problem("metrics", message, "put it in an evaluate stage of its own")
    elif ("pairs" in needs) != (table.format in PAIRED):
        wanted = f"format = {join_or(map(as_toml, PAIRED))}" if "pairs" in needs else "another format"
        message = f"{evaluation.stage.metrics[0]} has no use for rows of format {as_toml(table.format)}"
        yield evaluation.problem("data", message, f"name a data table with {wanted}")
    elif table.format == "text" and needs.keys() & {"answers", "choices"}:
        yield evaluation.problem("data", "holds plain text, which asks nothing", "name data with prompts and answers")


def answers_can_be_told(evaluation: EvaluateStage) -> Iterator[Problem]:
    table = evaluation.table
    if table is None or not evaluation.needs.keys() & {"answers", "references"}:
        return
    if table.format == "prompt" and table.data.completion is None:
        message = "is missing, and answers are compared with it"
        yield table.problem("completion", message, 'add completion = "…"')
    if table.data.train_on != "answer" and table.format not in PAIRED:
        message = f"is {as_toml(table.data.train_on)}, and {table.name} is evaluated: only last answers are compared"
        yield table.problem("train_on", message, "evaluate another table over the same rows")


def rows_are_read_at_once(evaluation: EvaluateStage) -> Iterator[Problem]:
    table = evaluation.table
    if table is not None and table.data.streaming:
        message = "rows that are evaluated are read at once"
        yield table.problem("streaming", message, "evaluate another table over the same rows")


def choices_have_fields(evaluation: EvaluateStage) -> Iterator[Problem]:
    chooses = "multiple_choice" in evaluation.stage.metrics
    for key in ("choices_field", "label_field"):
        if chooses and getattr(evaluation.stage, key) is None:
            yield evaluation.problem(key, "is missing: multiple_choice needs it", f'add {key} = "…"')
        elif not chooses and getattr(evaluation.stage, key) is not None:
            message = "counts only for the metric multiple_choice"
            yield evaluation.problem(key, message, 'remove it, or add "multiple_choice" to metrics')


def metrics_are_named_once(evaluation: EvaluateStage) -> Iterator[Problem]:
    metrics = evaluation.stage.metrics
    for metric in sorted({metric for metric in metrics if metrics.count(metric) > 1}):
        yield evaluation.problem("metrics", f"names {as_toml(metric)} {metrics.count(metric)} times", "name it once")


def metrics_are_ours(evaluation: EvaluateStage) -> Iterator[Problem]:
    """A metric of one's own is a program."""
    for metric in evaluation.stage.metrics:
        try:
            if Path(metric).is_absolute():
                trust.require(Path(metric))
        except UserError as error:
            yield evaluation.problem("metrics", error.message, error.remedy)


def decoding_is_of_one_kind(evaluation: EvaluateStage) -> Iterator[Problem]:
    stage = evaluation.stage
    if stage.beams > 1 and stage.temperature:
        message = "searches for the likeliest answer, and temperature draws one"
        yield evaluation.problem("beams", message, "remove one of them")
    if stage.top_p < 1 and not stage.temperature:
        message = "counts only where tokens are drawn"
        yield evaluation.problem("top_p", message, "remove it, or give a temperature above 0")


def processes_hold_whole_models(evaluation: EvaluateStage) -> Iterator[Problem]:
    parallel = evaluation.stage.parallel
    # Then [parallel] counts, which plan.resolve turns into processes with whole models.
    if parallel is None:
        return
    if parallel.zero_stage:
        message = f"{as_toml(parallel.strategy)} shares weights out, and an evaluation's processes hold all of them"
        yield evaluation.problem("parallel", message, 'write strategy = "ddp", or "single" for one process')
    elif parallel.strategy == "single" and parallel.world_size > 1:
        message = f'"single" is one process, and nodes × procs_per_node is {parallel.world_size}'
        yield evaluation.problem("parallel", message, 'write strategy = "ddp"')


def start_gives_answers(evaluation: EvaluateStage) -> Iterator[Problem]:
    evaluated = evaluation.whole.before
    if evaluated is not None and isinstance(evaluated.stage, Reward):
        message = "names a reward stage, whose model rates answers and gives none"
        yield evaluation.problem("start", message, "name a stage that trains a policy")


RULES: tuple[Callable[[EvaluateStage], Iterator[Problem]], ...] = (
    data_is_known,
    data_suits_metrics,
    answers_can_be_told,
    rows_are_read_at_once,
    choices_have_fields,
    metrics_are_named_once,
    metrics_are_ours,
    decoding_is_of_one_kind,
    processes_hold_whole_models,
    start_gives_answers,
)
