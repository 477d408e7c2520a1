"""The vocabulary of a recipe: every table and key that a user may write, with its default and its meaning.

Structs are frozen. A key that is not here is an error, never ignored. The string below a field is its documentation:
`ftlaunch schema` publishes it, so an editor shows it while the recipe is written.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from ftlaunch.adapter import Adapter, Full
from ftlaunch.bounds import Above0, AtLeast0, Fraction, Name, NonNegative, Positive, Text
from ftlaunch.noise import Noise, NoNoise


class Qat(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="qat"):
    """Quantization-aware training: layers compute with weights rounded to integers, and gradients pass straight through
    (arXiv 1712.05877). With an adapter it is W + scale·BA that is rounded. What is left is the rounded model."""

    bits: Annotated[int, Meta(ge=2, le=8)] = 4
    """Of an integer."""
    symmetric: bool = True
    """Signed integers around 0; else unsigned ones with a zero point."""
    granularity: Literal["tensor", "channel", "group"] = "channel"
    """What shares one scale: a matrix, an output channel of it, or `group_size` weights of a channel."""
    group_size: Positive = 64
    """Weights in a group; it divides the inputs of every layer."""
    learned_step: bool = False
    """Train the scales, too (LSQ, arXiv 1902.08153), instead of spanning the weights' range. Symmetric only."""


class BitLinear(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="bitlinear"):
    """BitNet b1.58: weights of -1, 0 and 1 times their mean magnitude, inputs in 8 bits by each token's largest
    (arXiv 2402.17764). A model that was not trained so loses much and needs many steps to recover."""

    rms_norm: bool = False
    """Norm the inputs of each layer first, as BitNet does; for models trained so from the start."""


class Model(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The base model and the number format it is held in."""

    path: Text
    """Hub id or folder with safetensors. Turn a .gguf file into such a folder with `ftlaunch import`."""
    revision: Text | None = None
    """Commit, tag or branch of a hub id. None is the hub's main branch."""
    allow_pickle: bool = False
    """Load pickled weights (pytorch_model.bin) where there are no others. Only for a hub id with `revision` = a full
    commit: a pickle can run code, and a branch can change."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Format of the frozen weights and of the arithmetic. Trained weights always keep an fp32 master copy."""
    quantization: Literal["none", "nf4", "fp4", "int8"] | Qat | BitLinear = "none"
    """"nf4" holds the frozen weights in 4 bits with double quantization (QLoRA, arXiv 2305.14314); "fp4" has another
    table of levels; "int8" is LLM.int8, with inputs in 8 bits but for the largest (arXiv 2208.07339). A table of kind
    "qat" or "bitlinear" trains through rounded weights instead."""

    @property
    def held_in_few_bits(self) -> bool:
        """Whether the weights are frozen in few bits; those that are trained through rounding are not."""
        return isinstance(self.quantization, str) and self.quantization != "none"

    @property
    def rounding(self) -> Qat | BitLinear | None:
        """How layers round their weights in training, if they do."""
        return None if isinstance(self.quantization, str) else self.quantization


class Data(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One data set: where its rows are, how a row becomes text, and which tokens are trained."""

    path: Text
    """A .csv, .json, .jsonl or .parquet file, a folder of such files, or a hub id."""
    config: Text | None = None
    """Configuration (subset) of a hub data set."""
    split: Text = "train"
    """Split of a hub data set."""
    revision: Text | None = None
    """Commit, tag or branch of a hub data set."""
    format: Literal["prompt", "text", "messages", "alpaca", "sharegpt", "preference", "ratings"] | None = None
    """Shape of a row. None: "prompt" where `prompt` and `completion` are given, "preference" where `chosen` and
    `rejected` are; otherwise it must be named. "preference" rows hold a better and a worse answer, "ratings" rows
    several answers with numbers, of which the best and the worst make a pair."""
    prompt: Text | None = None
    """Template of the user's turn over the row's fields: "Question: {question}", "{answer[value]}"."""
    completion: Text | None = None
    """Template of the answer over the row's fields."""
    chosen: Text | None = None
    """Template of the better answer, for format "preference". None: the field "chosen", a text or a list of turns.
    A text in which Human: and Assistant: take turns, and turns that begin with the user's, hold their prompt."""
    rejected: Text | None = None
    """Template of the worse answer, as `chosen`."""
    margin_field: Text | None = None
    """Field with a number from 0 up, for format "preference": how much better the chosen answer is.
    None: 1. For "ratings" it is the difference of the two ratings."""
    answers_field: Text = "completions"
    """Field with the list of answers, for format "ratings"."""
    answer_field: Text = "response"
    """Field of such an answer with its text."""
    rating_field: Text = "overall_score"
    """Field of such an answer with its rating, a number, higher for better."""
    system: Text | None = None
    """Template of a system turn put before every conversation that has none."""
    text_field: Text = "text"
    """Field with the text, for format "text"."""
    messages_field: Text | None = None
    """Field with the list of turns. None: "messages" for format "messages", "conversations" for "sharegpt"."""
    template: Text = "tokenizer"
    """Chat template: "tokenizer" (its own), "llama2", "chatml", "none" (prompt and answer as are), or a Jinja file."""
    train_on: Literal["answer", "assistant", "all"] = "answer"
    """Tokens that are trained: the last answer, every assistant turn, or everything."""
    max_length: Annotated[int, Meta(ge=8)] = 1024
    """Longest row in tokens."""
    overlong: Literal["truncate", "drop"] = "truncate"
    """What happens to a longer row: its end is cut off, or it is left out. Either is counted and shown.
    Of a pair each answer is cut by itself; one that then trains nothing, or is the same, leaves its pair out."""
    limit: Positive | None = None
    """Take at most so many rows."""
    test: Annotated[int, Meta(ge=0)] | Annotated[float, Meta(ge=0, lt=1)] = 0
    """Rows held out for evaluation, drawn with the recipe's seed: a count (100) or a fraction (0.05)."""
    weight: Above0 = 1.0
    """Share in a mixture of several data sets, relative to the others' weights."""
    streaming: bool = False
    """Read rows as training goes instead of first. The stage then needs `steps`, and `test` a count."""


class Optimizer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How gradients move the weights."""

    name: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW (arXiv 1711.05101). The 8-bit and paged forms are bitsandbytes'; paging needs a GPU."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: Above0 = 1e-8
    """Added to the root of the second moment."""
    weight_decay: AtLeast0 = 0.0
    """Decoupled weight decay of matrices; biases and norms have none."""
    lora_plus_ratio: Annotated[float, Meta(ge=1)] | None = None
    """LoRA+ (arXiv 2402.12354): the adapter's B matrices learn at so many times the learning rate; 16 in the paper.
    None: all learn alike."""


class Parallel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many processes there are and what they share."""

    strategy: Literal["single", "ddp", "zero1", "zero2", "zero3"] = "single"
    """One process; replicas (ddp); or DeepSpeed ZeRO, which also shards optimizer, gradients and weights (1, 2, 3)."""
    nodes: Positive = 1
    """Machines."""
    procs_per_node: Positive = 1
    """Processes on each machine, one a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" takes the GPUs where there are any."""
    offload: Literal["none", "cpu"] = "none"
    """"cpu" keeps optimizer state (and with zero3 the weights) in host memory. ZeRO only."""

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage; 0 where DeepSpeed is not used."""
        return {"zero1": 1, "zero2": 2, "zero3": 3}.get(self.strategy, 0)

    @property
    def world_size(self) -> int:
        """Processes on all nodes."""
        return self.nodes * self.procs_per_node


class Training(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every training stage has."""

    data: Name | list[Name]
    """Name of a [data.NAME] table, or several, mixed by their weights."""
    learning_rate: Above0 | None = None
    """Peak learning rate. None: what suits stage and adapter, such as 2e-4 for SFT with LoRA; the plan says which."""
    epochs: Above0 | None = None
    """Passes over the data. None: 1, unless `steps` is given."""
    steps: Positive | None = None
    """Optimizer steps, instead of `epochs`."""
    batch_size: Positive = 8
    """Rows (or pairs) in one optimizer step, over all processes and micro-batches, packed or not."""
    micro_batch_size: Positive | None = None
    """Rows (or pairs) in one forward pass of one process. None: batch_size / processes, so no accumulation."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after warm-up; linear and cosine end at 0."""
    warmup: Annotated[int, Meta(ge=0)] | Annotated[float, Meta(ge=0, lt=1)] = 0
    """Warm-up from 0 to the peak: steps (100) or a fraction of all steps (0.03)."""
    max_grad_norm: AtLeast0 = 1.0
    """Gradients are scaled down to this global norm. 0 turns clipping off."""
    activation_checkpointing: bool = False
    """Keep only each layer's input and compute the rest again in the backward pass: less memory, more time."""
    evaluate_every: Positive | None = None
    """Steps between evaluations on the rows held out by `data.NAME.test`; there is always one at the end."""
    save_every: Positive = 100
    """Steps between checkpoints; there is always one at the end."""
    keep: Positive = 2
    """Newest checkpoints that are kept. The best by evaluation loss is kept besides."""
    on_save_failure: Literal["go-on", "wait", "stop"] = "go-on"
    """When a checkpoint cannot be written: train on and save at the next one, wait until it can be, or stop.
    The last save of a stage always counts."""
    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """When a loss or gradient is NaN or infinite: stop, leave the step out, or go back to the newest checkpoint and
    leave out every batch since. The weights never see it, and the rows are named."""
    start: Annotated[int, Meta(ge=0)] | Text | None = None
    """Stage to start from: its kind, where one ahead has it, or its place counted from 0; "base" is the plain model.
    None: the training stage ahead of this one."""
    model: Model | None = None
    """Overrides [model] for this stage."""
    adapter: Adapter | None = None
    """Overrides [adapter] for this stage."""
    noise: Noise | None = None
    """Overrides [noise] for this stage; kind = "none" goes without."""
    optimizer: Optimizer | None = None
    """Overrides [optimizer] for this stage."""
    parallel: Parallel | None = None
    """Overrides [parallel] for this stage."""


class Sft(Training, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="sft"):
    """Supervised fine-tuning: cross-entropy of the trained tokens."""

    label_smoothing: Fraction = 0.0
    """Share of the target's probability spread over the whole vocabulary."""
    neftune_alpha: AtLeast0 = 0.0
    """Noise on embeddings, in training only, of scale alpha / sqrt(tokens · width) (NEFTune, arXiv 2310.05914)."""
    neftune_noise: Literal["uniform", "sign"] = "uniform"
    """The noise before it is scaled: uniform within ±1, or ±1 with equal chances (SymNoise, arXiv 2312.01523)."""
    r_drop: AtLeast0 = 0.0
    """Weight of R-Drop (arXiv 2106.14448): each batch is computed twice, under two draws of dropout and noise, and the
    loss is the mean of both cross-entropies and r_drop / 2 times the KL divergences of the two, one from the other."""
    packing: bool = True
    """Lay rows end to end instead of padding them. Rows never see each other and the loss is the same."""


class Pairwise(Training, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the stages that learn from pairs of answers have."""

    packing: bool = True
    """Lay answers end to end instead of padding them. They never see each other and the loss is the same."""
    share_prompt: bool = True
    """Compute what the two answers of a pair begin with once. The loss is the same. Needs packing."""


class Reward(Pairwise, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="reward"):
    """Reward model: one number for an answer, read at its last token, the chosen one's above the rejected one's.

    The loss is -log σ(r_chosen - r_rejected - margin) (Bradley-Terry; arXiv 2203.02155, margin 2307.09288).
    """

    margin: AtLeast0 = 0.0
    """The reward of the chosen answer must be larger by so much, times the pair's own margin (see the data table)."""
    centering: AtLeast0 = 0.0
    """Weight of (r_chosen + r_rejected)², which keeps rewards around 0; 0.01 does (arXiv 2312.09244)."""


class Dpo(Pairwise, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="dpo"):
    """Direct preference optimization against the policy that the stage starts from (arXiv 2305.18290)."""

    loss: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid"
    """"sigmoid" as in the paper; "ipo" squares the distance to 1 / (2·beta), per token (arXiv 2310.12036); "hinge" is
    SLiC's (arXiv 2305.10425); "robust" undoes the bias of labels wrong at the rate label_smoothing (2403.00409)."""
    beta: Above0 = 0.1
    """Strength of the pull towards the reference."""
    label_smoothing: Annotated[float, Meta(ge=0, lt=0.5)] = 0.0
    """Probability that a pair's label is wrong, for "sigmoid" (conservative DPO) and "robust"."""
    sft_weight: AtLeast0 = 0.0
    """Weight of the chosen answer's cross-entropy per token, added to the loss (RPO, arXiv 2404.19733)."""
    reference: Literal["live", "precomputed"] | None = None
    """"live" asks the frozen policy at each step: the base with the adapter off, or a copy of the adapter that the
    stage starts from. "precomputed" asks it for all pairs before the first step and keeps the answers on disk, where
    the next run finds them. Neither loads a second model. None: "live" with an adapter, else "precomputed"."""


class Orpo(Pairwise, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="orpo"):
    """Odds ratio preference optimization: SFT on the chosen answer and preference in one, without a reference
    (arXiv 2403.07691)."""

    beta: AtLeast0 = 0.1
    """Weight of the odds ratio loss beside the chosen answer's cross-entropy; the paper's lambda."""


SHIPPED_REWARDS = ("gsm8k",)
"""What `reward_function` may name without a file or module."""


class Ppo(Training, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="ppo"):
    """Proximal policy optimization: the policy answers prompts, each answer gets a score, and answers that score better
    than foreseen become more likely (arXiv 1707.06347, 2009.01325). Dropout is off."""

    reward_function: Text | None = None
    """Function that scores an answer: called with the prompt's text, the answer's text and the row, it returns a
    number. "FILE.py:NAME", with the file relative to the recipe, "package.module:NAME", or "gsm8k", which is shipped:
    1 where the answer's last number is the one in the row's field "answer", else 0."""
    reward_model: Text | None = None
    """Model that scores an answer: folder or hub id of a sequence classifier with one label, or the folder of a reward
    stage's artifact. None: the reward stage before this one, unless there is a `reward_function`."""
    rollout_size: Positive | None = None
    """Prompts that are answered before their answers are trained on, over all processes. None: batch_size."""
    ppo_epochs: Positive = 4
    """Passes over the answers of a rollout, in mini-batches of `batch_size`."""
    max_new_tokens: Positive = 128
    """Longest answer in tokens."""
    rollout_engine: Literal["torch", "vllm"] = "torch"
    """What answers: the model that is trained, or vLLM, which is faster on a GPU, with a copy of the base in a process
    beside each rank. A resumed run then has other answers than it would have had."""
    vllm_memory: Annotated[float, Meta(gt=0, lt=1)] | None = None
    """Share of a GPU's memory that vLLM takes. None: 0.3."""
    generation_batch_size: Positive = 32
    """Answers that one process generates side by side."""
    temperature: Above0 = 1.0
    """Divides the logits, in sampling and in training alike."""
    missing_eos_penalty: AtLeast0 = 0.0
    """Taken off the score of an answer that has not ended within `max_new_tokens`."""
    score_scaling: Literal["none", "running", "batch"] = "none"
    """"running" brings scores to mean 0 and deviation 1 by all that were seen so far; "batch" divides the rewards of
    tokens (scores and KL) by their deviation within the rollout, with their mean kept."""
    kl_coefficient: AtLeast0 = 0.05
    """Price of a nat of KL between policy and reference, paid at each token. The reference is the policy as the stage
    finds it."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """How KL is told from a sampled token: "k1" is log p - log q; "k3" is q/p - 1 - log q/p, never negative."""
    kl_target: Above0 | None = None
    """KL in nats an answer that the coefficient is steered towards (arXiv 1909.08593). None: it stays as it is."""
    kl_horizon: Positive = 10_000
    """Answers over which the coefficient follows `kl_target`; more is slower."""
    gamma: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Discount of a reward for each token that it is away."""
    gae_lambda: Annotated[float, Meta(ge=0, le=1)] = 0.95
    """Decay of generalized advantage estimation: 1 trusts the rewards, 0 the value head (arXiv 1506.02438)."""
    whiten_advantages: bool = True
    """Bring the advantages of a rollout's tokens to mean 0 and deviation 1."""
    clip: Above0 = 0.2
    """The probability ratio of new to old policy counts within 1 ± clip."""
    value_clip: Above0 = 0.2
    """A value counts within ± this of what it was at the rollout."""
    value_weight: AtLeast0 = 0.1
    """Weight of the value loss. The value head reads the policy's own hidden states."""
    entropy_weight: AtLeast0 = 0.0
    """Weight of the entropy, which is taken off the loss."""
    samples_every: Positive = 10
    """Rollouts from one that leaves samples with their scores in samples.jsonl to the next; the first one does."""
    packing: bool = True
    """Lay rows end to end in scoring and training instead of padding them. The loss is the same."""


class Merge(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="merge"):
    """Folds the adapter into the base and checks the result against the adapter model."""

    start: Annotated[int, Meta(ge=0)] | Text | None = None
    """Stage whose adapter is folded: its kind, where one ahead has it, or its place counted from 0.
    None: the training stage ahead of this one."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Format of the merged weights. None: the base's own, as on disk."""
    max_shard_bytes: Annotated[int, Meta(ge=1_000_000)] = 5_000_000_000
    """Largest weight file. Memory stays within about one shard."""
    max_kl: Above0 | None = None
    """Largest mean KL divergence (nats a token) of the merged model from the adapter model on probe text.
    None: what rounding explains, 1e-5 in fp32, 0.01 in fp16, 0.02 in bf16, 0.2 from a quantized base."""


Stage = Sft | Reward | Dpo | Orpo | Ppo | Merge


class Sweep(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Variants of a recipe, which `ftlaunch compare` runs one after another: each of `variants` with each combination
    of `grid`. The first is what the others are compared with."""

    variants: dict[Name, list[Text]] = field(default_factory=dict[Name, list[Text]])
    """Name of a variant → settings as `--set` has them: dora = ["adapter.kind=dora", "adapter.rank=16"]."""
    grid: dict[Text, Annotated[list[bool | int | float | Text], Meta(min_length=1)]] = field(
        default_factory=dict[Text, list[bool | int | float | Text]]
    )
    """Key, in quotes → its values: "adapter.rank" = [4, 8]."""


class Recipe(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole run: a model, what is done to it, on which data and on how many processes."""

    name: Name
    """The run's name, and its folder's: runs/NAME."""
    model: Model
    """[model]"""
    stage: Annotated[list[Stage], Meta(min_length=1)]
    """[[stage]] entries, in the order in which they run; each starts from what the one before it made."""
    data: dict[Name, Data] = field(default_factory=dict[Name, Data])
    """[data.NAME] tables."""
    adapter: Adapter = field(default_factory=Full)
    """[adapter]. Without one, every weight is trained."""
    noise: Noise = field(default_factory=NoNoise)
    """[noise]. Disturbs activations in training, and may replace the model's activation function."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """[optimizer]"""
    parallel: Parallel = field(default_factory=Parallel)
    """[parallel]"""
    seed: NonNegative = 42
    """Seed of the split, the row order, the adapter's first weights and, with the rank, of dropout and noise."""
    deterministic: bool = False
    """Only kernels that give the same bits every time; slower on a GPU."""
    sweep: Sweep | None = None
    """[sweep]. Variants of this recipe, for `ftlaunch compare`."""
    extends: Text | None = None
    """A recipe whose keys count where this one is silent. It may not itself extend another."""
