"""Rules between the keys of a training stage and the tables that count for it."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from msgspec import Struct

from ftlaunch.errors import Problem, UserError
from ftlaunch.load import Loaded
from ftlaunch.load.messages import as_toml, did_you_mean, join_or
from ftlaunch.load.origins import KeyPath
from ftlaunch.plan import family, resolve
from ftlaunch.plan.resolve import Resolved, ResolvedStage
from ftlaunch.recipe.adapter import LowRank, Prefix, Prompt, PTuning
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.model import Qat
from ftlaunch.recipe.names import is_local
from ftlaunch.recipe.stages import Dpo, Pairwise, Ppo, Sft, Training
from ftlaunch.rows.conversations import PAIRED
from ftlaunch.rules.data import DataTable
from ftlaunch.safety import model_files, trust

COMMIT = re.compile(r"[0-9a-f]{40}")
TableName = Literal["model", "adapter", "noise", "optimizer", "parallel"]


class JudgedStage(Struct, frozen=True):
    """A stage of a recipe, and where its keys stand."""

    loaded: Loaded
    whole: ResolvedStage
    """The tables that count for it, and the stages that it needs."""

    def given(self, key: str) -> bool:
        return self.loaded.where.given(("stage", self.whole.index, key))

    def problem(self, key: str, message: str, remedy: str) -> Problem:
        return self.loaded.problem(("stage", self.whole.index, key), message, remedy)


class TrainedStage(JudgedStage, frozen=True):
    """A training stage of a recipe."""

    stage: Training

    @property
    def resolved(self) -> Resolved:
        return self.whole.tables

    @property
    def data_tables(self) -> list[DataTable]:
        """Its data tables, those that do not exist left out."""
        known = self.loaded.recipe.data
        return [DataTable(self.loaded, name, known[name]) for name in self.stage.data_names if name in known]

    @property
    def data(self) -> list[Data]:
        return [table.data for table in self.data_tables]

    def table_problem(self, table: TableName, key: str, message: str, remedy: str) -> Problem:
        """A problem with a key of the stage's own table, or of the recipe's where the stage has none."""
        own: KeyPath = () if getattr(self.stage, table) is None else ("stage", self.whole.index)
        return self.loaded.problem((*own, table, key), message, remedy)


def trainings(loaded: Loaded) -> Iterator[TrainedStage]:
    """The recipe's training stages."""
    for one in resolve.resolve(loaded.recipe):
        if isinstance(one.stage, Training):
            yield TrainedStage(loaded, one, one.stage)


def names_modules(training: TrainedStage, table: TableName, key: str, usual: str) -> Iterator[Problem]:
    """Judge a key that is a list of module names, a regular expression, or the word for the `usual` ones."""
    written = getattr(getattr(training.resolved, table), key)
    if isinstance(written, list):
        if not written:
            yield training.table_problem(table, key, "names no module", f"write {key} = {as_toml(usual)}")
        return
    try:
        # The usual word compiles, too, and needs no exception.
        re.compile(written)
    except re.error as error:
        message = f"{as_toml(written)} is not a regular expression: {error}"
        remedy = f"correct it, or write {as_toml(usual)} or a list of module names"
        yield training.table_problem(table, key, message, remedy)


def data_is_known(training: TrainedStage) -> Iterator[Problem]:
    known = list(training.loaded.recipe.data)
    names = training.stage.data_names
    if not names:
        yield training.problem(
            "data", "names no data", f"name {join_or(known)}" if known else "add a [data.NAME] table"
        )
    # Each name once, in the recipe's order, as sets have none.
    for name in dict.fromkeys(names):
        if name not in known:
            add = f"add a table headed [data.{name}]"
            remedy = did_you_mean(name, known, f"name {join_or(known)}, or {add}" if known else add)
            yield training.problem("data", f"there is no table [data.{name}]", remedy)
        elif names.count(name) > 1:
            remedy = f"name it once; its share is data.{name}.weight"
            yield training.problem("data", f"names {as_toml(name)} {names.count(name)} times", remedy)


def data_suits_stage(training: TrainedStage) -> Iterator[Problem]:
    """Pairs are for the stages that compare answers, and nothing else is; PPO takes the prompts of any rows."""
    if isinstance(training.stage, Ppo):
        return
    compares = isinstance(training.stage, Pairwise)
    for table in training.data_tables:
        if table.format == "unpaired":
            message = f"[data.{table.name}] has single answers with labels, which no kind of stage trains on"
            yield training.problem("data", message, "name a data table with pairs, or rows with good answers only")
        elif table.format and (table.format in PAIRED) != compares:
            kind = as_toml(training.stage.__struct_config__.tag)
            message = f"a stage of kind {kind} cannot train on [data.{table.name}], of format {as_toml(table.format)}"
            wanted = f"format = {join_or(map(as_toml, PAIRED))}" if compares else "another format"
            yield training.problem("data", message, f"name a data table with {wanted}")


def answers_are_there(training: TrainedStage) -> Iterator[Problem]:
    """Only PPO, which answers itself, needs no completion."""
    for table in training.data_tables:
        lacks = table.data.prompt is not None and table.data.completion is None
        if lacks and table.format in ("prompt", None) and isinstance(training.stage, Sft):
            message = 'is missing: the format "prompt" needs prompt and completion'
            yield table.problem("completion", message, 'add completion = "…"')


def smoothing_suits_loss(training: TrainedStage) -> Iterator[Problem]:
    stage = training.stage
    if isinstance(stage, Dpo) and stage.label_smoothing and stage.loss not in ("sigmoid", "robust"):
        message = f"counts only for the losses sigmoid and robust, and this is {as_toml(stage.loss)}"
        yield training.problem("label_smoothing", message, 'remove it, or write loss = "sigmoid" or "robust"')


def experts_are_balanced_in_plain_passes(training: TrainedStage) -> Iterator[Problem]:
    stage = training.stage
    if not isinstance(stage, Sft) or not stage.router_loss:
        return
    if stage.r_drop:
        yield training.problem("router_loss", "does not go with r_drop, which computes a batch twice", "remove one")
    if isinstance(training.resolved.adapter, Prefix | Prompt | PTuning):
        message = "does not go with virtual tokens, which experts would be balanced for as well"
        yield training.problem("router_loss", message, "remove it, or write another adapter.kind")


def steps_are_learned_around_zero(training: TrainedStage) -> Iterator[Problem]:
    rounding = training.resolved.model.rounding
    if isinstance(rounding, Qat) and rounding.learned_step and not rounding.symmetric:
        message = "learned_step needs integers around 0, and symmetric is false"
        yield training.table_problem("model", "quantization", message, "remove one of them")


def one_length(training: TrainedStage) -> Iterator[Problem]:
    if training.stage.epochs is not None and training.stage.steps is not None:
        yield training.problem("steps", "is given together with epochs", "keep the one that is meant")


def batch_divides(training: TrainedStage) -> Iterator[Problem]:
    batch, micro = training.stage.batch_size, training.stage.micro_batch_size
    world = training.resolved.parallel.world_size
    if batch % world:
        unit = world * (micro or 1)
        # Multiples of the micro-batch as well, so that the remedy is not refused in turn.
        below = batch // unit * unit
        values = [str(value) for value in (below, below + unit) if value]
        message = f"{batch} rows cannot be shared out evenly over {world} processes"
        yield training.problem("batch_size", message, f"write batch_size = {join_or(values)}")
    elif micro and batch % (micro * world):
        share = batch // world
        values = [str(value) for value in range(1, share + 1) if share % value == 0]
        message = f"micro-batches of {micro} rows cannot make up the {share} rows that each process has of {batch}"
        yield training.problem("micro_batch_size", message, f"write micro_batch_size = {join_or(values)}")


def warmup_ends(training: TrainedStage) -> Iterator[Problem]:
    warmup, steps = training.stage.warmup, training.stage.steps
    # A fraction is below 1, so its warm-up always ends.
    if isinstance(warmup, int) and steps is not None and warmup >= steps:
        message = f"{warmup} steps of warm-up leave nothing of {steps} steps"
        yield training.problem("warmup", message, f"write warmup below {steps}, or a fraction such as 0.03")


def streams_need_steps(training: TrainedStage) -> Iterator[Problem]:
    if training.stage.steps is not None or not any(data.streaming for data in training.data):
        return
    remedy = "write steps instead, or turn the data's streaming off"
    if training.stage.epochs is not None:
        yield training.problem("epochs", "cannot be counted, as the length of streamed data is not known", remedy)
    else:
        yield training.problem("steps", "is missing, and the length of streamed data is not known", "add steps = …")


def single_is_one_process(training: TrainedStage) -> Iterator[Problem]:
    parallel = training.resolved.parallel
    if parallel.strategy == "single" and parallel.world_size > 1:
        message = f'"single" is one process, and nodes × procs_per_node is {parallel.world_size}'
        remedy = 'write strategy = "ddp", "zero1", "zero2" or "zero3"'
        yield training.table_problem("parallel", "strategy", message, remedy)


def revision_needs_a_hub_id(training: TrainedStage) -> Iterator[Problem]:
    model = training.resolved.model
    if model.revision is not None and is_local(model.path):
        message = f"counts only for a model of the hub, and {model.path} is on this machine"
        yield training.table_problem("model", "revision", message, "remove it")


def model_is_plain(training: TrainedStage) -> Iterator[Problem]:
    """A folder is looked into now; what the hub sends is judged by the trainer before it is loaded."""
    if not is_local(training.resolved.model.path):
        return
    folder = Path(training.resolved.model.path)
    try:
        # Ownership first: what others may write can change after its content was judged.
        trust.require(folder)
        model_files.require_plain(folder)
        model_files.require_weights_to_train(folder)
    except UserError as error:
        yield training.table_problem("model", "path", error.message, error.remedy)


def weights_are_whole(training: TrainedStage) -> Iterator[Problem]:
    model, strategy = training.resolved.model, training.resolved.parallel.strategy
    name, remedy = family.name(Path(model.path)), 'write strategy = "ddp", "zero1" or "zero2"'
    if name.removesuffix("_text") in family.UNSHARDED and strategy == "zero3":
        why = f"does not go with {name}, of which processes die under ZeRO-3"
        yield training.table_problem("parallel", "strategy", why, remedy)
    if name not in family.RESCALED:
        return
    why = f"does not go with {name}, whose code multiplies weights in place"
    if model.is_quantized:
        yield training.table_problem("model", "quantization", why, 'write quantization = "none"')
    if strategy == "zero3":
        yield training.table_problem("parallel", "strategy", why, remedy)


def jitter_is_not_sharded(training: TrainedStage) -> Iterator[Problem]:
    """Autograd forbids it on what DeepSpeed hands to trained experts. Only in SFT does the trainer leave jitter on."""
    resolved = training.resolved
    if not isinstance(training.stage, Sft) or resolved.parallel.strategy != "zero3":
        return
    trains_experts = resolved.adapter.experts if isinstance(resolved.adapter, LowRank) else True
    if trains_experts and family.jitters(Path(resolved.model.path)):
        message = (
            "does not go with experts that are trained and router_jitter_noise, which changes their input in place"
        )
        remedy = (
            'write strategy = "ddp", "zero1" or "zero2", or set router_jitter_noise to 0 in the model\'s config.json'
        )
        yield training.table_problem("parallel", "strategy", message, remedy)


def pickles_are_pinned(training: TrainedStage) -> Iterator[Problem]:
    model = training.resolved.model
    if not model.allow_pickle:
        return
    if is_local(model.path):
        message = f"counts only for a model of the hub, whose revision can be pinned, and {model.path} is a folder"
        yield training.table_problem("model", "allow_pickle", message, "remove it, and save the model as safetensors")
    # In full, as a branch or tag may be called like a short hash.
    elif not COMMIT.fullmatch(model.revision or ""):
        message = "needs revision = a full commit (40 hex digits): what a branch or tag names can change"
        yield training.table_problem("model", "allow_pickle", message, "look the commit up on the model's page")


RULES: tuple[Callable[[TrainedStage], Iterator[Problem]], ...] = (
    data_is_known,
    data_suits_stage,
    answers_are_there,
    smoothing_suits_loss,
    experts_are_balanced_in_plain_passes,
    steps_are_learned_around_zero,
    one_length,
    batch_divides,
    warmup_ends,
    streams_need_steps,
    single_is_one_process,
    revision_needs_a_hub_id,
    model_is_plain,
    weights_are_whole,
    jitter_is_not_sharded,
    pickles_are_pinned,
)
