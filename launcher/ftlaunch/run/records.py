"""What the trainer leaves in a stage's folder, as both sides know it: it writes these, and the launcher reads them."""

from pathlib import Path
from typing import Any, Literal, Required, TypedDict

import msgspec
from msgspec import UNSET, Struct, UnsetType, field

from ftlaunch.recipe.model import Dtype
from ftlaunch.run.files import read_json

Interval = tuple[float, float]


class Failure(Struct, frozen=True, kw_only=True):
    """error.json: the first error of an attempt."""

    rank: int | None
    """None: the processes were never started, or nobody knows which one it was."""
    type: str
    """Name of the exception or of the signal, or the exit code."""
    message: str
    remedy: str | None = None
    traceback: str = ""
    """Python's, or the last lines of the log."""
    log: str
    """Where to read on."""
    user_error: bool = False
    """Whether the remedy is the user's to apply and the traceback of no use to them."""

    @property
    def who(self) -> str:
        """The rank that failed, in front of what is said of it; empty where nobody knows which."""
        return "" if self.rank is None else f"rank {self.rank}: "

    @property
    def first_line(self) -> str:
        """Who failed, and the first line of the message."""
        return self.who + self.message.partition("\n")[0]


class Stopped(Struct, frozen=True, kw_only=True):
    """stopped.json: all ranks saved and left because they were asked to."""

    reason: str = ""
    step: int | None = None


class Precision(Struct, frozen=True, kw_only=True):
    """precision.json: the number format that a stage computes in, where its recipe says "auto"."""

    dtype: Dtype
    why: str
    nodes: dict[str, str]
    """What each node would have computed in, and why, by its host name."""


class SaveFailure(Struct, frozen=True, kw_only=True):
    """save_failure.json: a checkpoint could not be written, and none has been since. Training goes on all the same."""

    step: int
    cause: str


class RowLosses(Struct, frozen=True, kw_only=True):
    """evaluation.json: what each row held out has cost in the newest evaluation, in the order of the rows."""

    rows: list[tuple[float, int]]
    """(cross-entropy in nats, trained tokens) of each."""


# A dict type and no Struct: what stages, adapters and noise add passes through unlisted.
class StepMetrics(TypedDict, total=False):
    """The keys of a line of metrics.jsonl that every optimizer step has; its stage, adapter and noise add their own.

    An evaluation is a line too, with `step`, `time` and keys that begin with "eval/".
    """

    step: Required[int]
    time: float
    """Unix seconds."""
    steps: int
    """Optimizer steps of the whole stage."""
    loss: float | None
    """None: not finite."""
    learning_rate: float
    grad_norm: float | None
    """The norm before clipping."""
    tokens: int
    """Trained on so far, over all ranks."""
    tokens_per_second: float
    epoch: float | None
    """None: of a stream, whose length nobody knows."""
    peak_memory_bytes: int
    """Peak of the rank that used most."""
    skipped: int
    """1, and absent elsewhere, where no update was made, as loss or gradient is not finite."""
    rewound_to: int
    """Step of the checkpoint that such a step went back to."""


class Counts(Struct, frozen=True, kw_only=True):
    """What became of a data set's rows; of pairs, each counts once."""

    rows: int = 0
    """Read."""
    kept: int = 0
    """Rows or pairs to train on; a row that was split counts as often as it has parts."""
    tokens: int = 0
    """Tokens of the rows kept."""
    trained: int = 0
    """Trained tokens of the rows kept that something predicts."""
    truncated: int = 0
    """Rows kept, or left out as untrained, whose end was cut off."""
    lost: int = 0
    """Tokens that were cut off."""
    split: int = 0
    """Rows that make several."""
    parted: int = 0
    """Rows in which a token lay across the border of prompt and answer, and was parted there."""
    control: int = 0
    """Rows with a control token in what is said, which is encoded as text."""
    respaced: int | None = None
    """Rows of which the chat template changes white space of a trained answer, such as its indentation. None: the rows
    were tokenized by an earlier version, which did not count them."""
    first_respaced: str | None = None
    """The first of them, as "facts.jsonl:17"."""
    dropped_untrained: int = 0
    """Rows left out because no token of theirs would be trained, such as those whose answer was cut off."""
    unfit: dict[str, int] = field(default_factory=dict[str, int])
    """Rows left out because of what they hold, by the reason."""
    excused: dict[str, int] = field(default_factory=dict[str, int])
    """Rows left out that are no mistake: blank, too long, or pairs without a better answer, by the reason."""
    longest: int = 0
    """Tokens of the longest row, of a pair both answers; 0 where nobody has measured it."""
    lengths: list[int] = field(default_factory=list[int])
    """Rows by their tokens: how many lie in each of equally wide parts of 0 to `longest`."""
    examples: list[str] = field(default_factory=list[str])
    """The first rows left out, as "facts.jsonl:17: field answer is null"."""


class Best(Struct, frozen=True, kw_only=True):
    """The best evaluation of a stage, whose checkpoint is kept."""

    step: int
    by: str
    """The score that it was chosen by."""
    score: float


class TrainingResult(Struct, frozen=True, kw_only=True):
    """result.json of a training stage."""

    steps: int
    tokens: int
    trained_parameters: int = 0
    data: dict[str, Counts] = {}
    artifact: str
    """Name of its folder."""
    probe: dict[str, Any] = {}
    """What was found before the first step: in which layout rows are computed, and how well it agrees."""
    best: Best | UnsetType = UNSET
    """Absent where nothing was evaluated."""


class Gap(Struct, frozen=True):
    """How much one model's score is above another's, over the same examples."""

    mean: float
    interval: Interval
    """95 %; one that holds 0 is no difference."""


class EvaluationResult(Struct, frozen=True, kw_only=True):
    """result.json of an evaluate stage."""

    data: str
    examples: int
    references: int
    prompts_trained_on: int
    scores: dict[str, float | None]
    """None: not finite."""
    intervals: dict[str, Interval]
    # UNSET leaves the key out of the JSON, where None would write null.
    base_scores: dict[str, float | None] | UnsetType = UNSET
    """Scores of the base; absent, as are the differences from it, where the stage does not compare."""
    differences: dict[str, Gap] | UnsetType = UNSET
    answer_words: float | UnsetType = UNSET
    """Mean length of answers; absent where none was asked for."""


class Divergence(Struct, frozen=True):
    """Distance of a model from a reference over all positions of the probes; of a reward model, over their rewards."""

    max_logit_difference: float
    """Largest difference of a logit; of a reward model, of a reward."""
    kl: float
    """Mean KL divergence from the reference, nats per token; of a reward model, of its preferences, nats per pair."""
    top1_agreement: float
    """Share of positions at which both prefer the same token; of pairs of which both prefer the same probe."""
    of: Literal["tokens", "rewards"] = "tokens"
    """What the models say."""
    base_kl: float | None = None
    """KL of the bare base, without the adapter."""
    effect: float | None = None
    """Share of what the adapter does to the logits (or rewards) that the model does too: 1 of a perfect merge."""

    @property
    def words(self) -> tuple[str, str, str]:
        """What is compared, what the KL is of, and what is the same in a share of cases."""
        if self.of == "rewards":
            return "reward", "pair", "preference in {} of pairs"
        return "logit", "token", "first choice at {} of positions"

    def __str__(self) -> str:
        value, unit, same = self.words
        told = [f"max |Δ{value}| {self.max_logit_difference:.3g}", f"KL {self.kl:.3g} nats per {unit}"]
        told += [] if self.base_kl is None else [f"of the bare base {self.base_kl:.3g}"]
        told += [] if self.effect is None else [f"effect {self.effect:.3g}"]
        return ", ".join([*told, f"same {same.format(f'{self.top1_agreement:.1%}')}"])


class MergeResult(Divergence, frozen=True, kw_only=True):
    """result.json of a merge: the merged model against the adapter model."""

    method: str
    """"base" adds the adapter to the base's own weights; "dequantized" to what the weights in few bits stand for."""
    tried: dict[str, Divergence] = {}
    """What came of each method."""


Result = TrainingResult | EvaluationResult | MergeResult


def read_result(path: Path, kind: str) -> Result | None:
    """The result of a stage of a kind; None where it has none, or another version of ftlaunch has written it."""
    types: dict[str, type[Result]] = {"merge": MergeResult, "evaluate": EvaluationResult}
    try:
        return read_json(path, types.get(kind, TrainingResult))
    # ValidationError is sound JSON of another shape. A torn file is not excused: results are written by rename.
    except msgspec.ValidationError:
        return None


def read_verdict(path: Path) -> dict[str, Any]:
    """Return what a stage found before its first step; {} before that, and in runs of older versions."""
    return read_json(path, dict[str, Any]) or {}
