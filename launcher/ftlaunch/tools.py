"""The options of each tool that needs torch: the command line writes them, `python -m fttrain.tools.NAME` reads them.

A struct's tag is the tool's name. Models are settled names (`ftlaunch.recipe.names`); other paths count from where the
tool is called.
"""

from typing import Literal

from msgspec import Struct

from ftlaunch.recipe.recipe import Recipe

WeightFormat = Literal["int", "ternary", "nf4", "fp4"]
Granularity = Literal["tensor", "channel", "group"]
ActivationGranularity = Literal["tensor", "token"]
CalibratorName = Literal["min-max", "moving-average", "percentile", "mse", "entropy", "power-of-two"]
SavedDtype = Literal["bf16", "fp16", "fp32"]


# Unknown fields are forbidden: launcher and trainer of two versions then stop instead of dropping an option.
class ToolOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="tool"):
    """What a tool is called with."""

    @property
    def module(self) -> str:
        """The trainer's module that is started with them."""
        return f"fttrain.tools.{self.__struct_config__.tag}"


class MergeOptions(ToolOptions, frozen=True, kw_only=True, tag="merge"):
    """`ftlaunch merge`."""

    source: str
    """The folder of a run, an artifact or a PEFT adapter."""
    out: str
    dtype: SavedDtype | None = None
    """Format of the merged weights. None: the base's."""
    max_kl: float | None = None
    """None: what rounding explains."""


class ImportOptions(ToolOptions, frozen=True, kw_only=True, tag="import_gguf"):
    """`ftlaunch import` of a GGUF file."""

    source: str
    out: str
    dtype: SavedDtype = "bf16"


class UnpackOptions(ToolOptions, frozen=True, kw_only=True, tag="unpack"):
    """`ftlaunch import` of a folder that `ftlaunch quantize --packed` has written."""

    source: str
    out: str


class PushOptions(ToolOptions, frozen=True, kw_only=True, tag="push"):
    """`ftlaunch push`."""

    folder: str
    """Folder of a model or an adapter."""
    repository: str
    public: bool = False
    revision: str | None = None
    """Branch. None: main."""
    dry_run: bool = False


class ChatOptions(ToolOptions, frozen=True, kw_only=True, tag="chat"):
    """`ftlaunch chat`."""

    models: list[str]
    """Model, artifact or adapter folders, or ID or ID@REVISION of the hub."""
    prompt: str | None = None
    """None: a conversation."""
    max_new_tokens: int | None = None
    """None: 64, in a conversation 512."""
    temperature: float = 0


class ServeOptions(ToolOptions, frozen=True, kw_only=True, tag="serve"):
    """`ftlaunch serve`."""

    model: str
    compare: str | None = None
    """A second model, or "base": that of the first one."""
    host: str = "127.0.0.1"
    port: int = 8000
    # msgspec copies an empty list for each struct, so no two of them share it.
    allow_host: list[str] = []
    batch_size: int = 8
    most_waiting: int = 64
    """Requests that wait for a model; one more is turned away."""
    max_new_tokens: int = 1024
    timeout: float = 300.0
    """Seconds that an answer may take."""


class EvaluateOptions(ToolOptions, frozen=True, kw_only=True, tag="evaluate"):
    """`ftlaunch eval`."""

    # The recipe itself and not its file, which lacks what `--set` and `extends` gave.
    recipe: Recipe
    models: list[str]
    metrics: tuple[str, ...] = ("bleu", "nist", "coco_rouge_l")
    """The scores of the E2E challenge, where the user names none."""
    data: str | None = None
    """None: the only one that fits."""
    prompts: int | None = None
    """None: all."""
    max_new_tokens: int = 128
    choices_field: str | None = None
    label_field: str | None = None
    resamples: int = 1000
    answers: str | None = None
    """A .jsonl to write prompts, references and answers to."""
    json: bool = False


class HarnessOptions(ToolOptions, frozen=True, kw_only=True, tag="harness"):
    """`ftlaunch eval --task`."""

    models: list[str]
    tasks: tuple[str, ...]
    folder: str | None = None
    """Folder of tasks in addition to the harness's own."""
    prompts: int | None = None
    """Prompts of each task. None: all."""
    batch_size: int = 8
    json: bool = False


class PreviewOptions(ToolOptions, frozen=True, kw_only=True, tag="preview"):
    """`ftlaunch preview`."""

    recipe: Recipe
    rows: int = 2
    """Samples of each data set."""
    json: bool = False


class SpikeLimits(Struct, frozen=True):
    """When a value is a spike. All that are set must hold, for input and output both."""

    absolute: float = 50
    """Least magnitude; the paper's code has 50. 0 turns the test off."""
    relative: float = 10
    """Least magnitude as a multiple of the median over all layers' largest. 0 turns the test off."""
    share: float = 0.5
    """Least share of the output's spike that the one weight must make up: W[row, column] · X[column] / Y[row]."""
    passes: int = 10
    """Most rounds of finding and zeroing."""


class SuperweightsOptions(ToolOptions, frozen=True, kw_only=True, tag="superweights"):
    """`ftlaunch superweights`."""

    model: str
    out: str = "superweights"
    text: str | None = None
    """A text or data file to measure perplexity on. None: the shipped one."""
    limits: SpikeLimits = SpikeLimits()
    ablate: bool = False
    attention_spikes: bool = False
    json: bool = False


class QuantizeOptions(ToolOptions, frozen=True, kw_only=True, tag="quantize"):
    """`ftlaunch quantize`."""

    model: str
    out: str
    format: WeightFormat = "int"
    bits: int = 4
    """Bits of an integer; the next four keys are of integers, too."""
    asymmetric: bool = False
    granularity: Granularity = "group"
    group_size: int = 64
    calibrator: CalibratorName = "min-max"
    activation_bits: int | None = None
    """None: inputs are not rounded."""
    activation_granularity: ActivationGranularity = "token"
    calibration: str | None = None
    """A text or data file to calibrate activations on. None: `text`."""
    text: str | None = None
    """A text or data file to measure on. None: the shipped one."""
    protect: bool = False
    packed: bool = False
    json: bool = False
