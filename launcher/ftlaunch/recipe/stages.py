"""The vocabulary of [[stage]], and of the tables that a stage may have of its own."""

from typing import Annotated, ClassVar, Final, Literal

from msgspec import Meta, field

from ftlaunch.recipe.adapter import Adapter
from ftlaunch.recipe.model import Model
from ftlaunch.recipe.noise import Noise
from ftlaunch.recipe.types import (
    Above0,
    AtLeast0,
    Fraction,
    FunctionName,
    Kind,
    MetricName,
    ModelName,
    Name,
    NonNegative,
    Positive,
    Table,
    Text,
)

# rules.compatibility finds the paged optimizers by their prefix, and the ZeRO strategies by theirs.
OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
Strategy = Literal["single", "ddp", "zero1", "zero2", "zero3"]


class Optimizer(Table, frozen=True, kw_only=True):
    """How gradients move the weights."""

    name: OptimizerName = "adamw"
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


class Parallel(Table, frozen=True, kw_only=True):
    """How many processes there are and what they share."""

    strategy: Strategy | Literal["auto"] = "single"
    """One process; replicas (ddp); or DeepSpeed ZeRO, which also shards optimizer, gradients and weights (1, 2, 3).
    "auto" takes the first of these that fits this machine's memory as `ftlaunch plan` foresees it, and says why; the
    run keeps what it began with. It is refused for a cluster, whose nodes it cannot see."""
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

    def ranks_of(self, node: int) -> range:
        """Global ranks on one of the nodes, counted from 0: with 4 processes on each, node 1 has ranks 4 to 7."""
        return range(node * self.procs_per_node, (node + 1) * self.procs_per_node)


class Training(Kind, frozen=True, kw_only=True):
    """What every training stage has."""

    # Only for LoRA: `Adapter.rate` adapts it, and full fine-tuning gets a tenth of it.
    lora_rate: ClassVar[float]
    """Peak learning rate that suits it with LoRA when the recipe names none."""
    evaluated: ClassVar[tuple[str, ...]] = ()
    """Scores of its evaluations that tell the better checkpoint."""
    has_head: ClassVar[bool] = False
    """Whether it trains a head on the model's hidden states, which reads rows as they are."""
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
    eval_metrics: list[MetricName] = field(default_factory=list[str])
    """Metrics of answers to prompts held out, generated at each evaluation: those of an evaluate stage that look at
    answers, such as "bleu". Their scores stand in metrics.jsonl as "eval/bleu" and so on."""
    eval_prompts: Positive | None = None
    """Prompts that are answered at each evaluation: the first of those held out. None: 64."""
    eval_max_new_tokens: Positive | None = None
    """Longest of these answers in tokens. None: 128."""
    eval_temperature: AtLeast0 | None = None
    """Temperature at which these answers are drawn. None or 0: the likeliest token each time."""
    eval_beams: Positive | None = None
    """Beams of a search for the likeliest of these answers. None or 1: no search."""
    best_by: Text | None = None
    """Score that the best checkpoint is chosen by: "loss", "token_accuracy", "rewards/accuracy" or another one of the
    stage's evaluations, or a score of `eval_metrics`, such as "bleu" or "rougeL". None: "loss"; PPO: "reward"."""
    save_every: Positive = 100
    """Steps between checkpoints; there is always one at the end."""
    keep: Positive = 2
    """Newest checkpoints that are kept. The best by `best_by` is kept as well."""
    on_save_failure: Literal["go-on", "wait", "stop"] = "go-on"
    """When a checkpoint cannot be written: train on and save at the next one, wait until it can be, or stop.
    The last save of a stage always counts."""
    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """When a loss or gradient is NaN or infinite: stop, leave the step out, or go back to the newest checkpoint and
    leave out every batch since. The weights never see it, and the rows are named."""
    start: Annotated[int, Meta(ge=0)] | Text | None = None
    """Stage to start from: an earlier stage's kind, if only one has it, or its index from 0; "base" is the plain model.
    None: the previous training stage."""
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

    @property
    def data_names(self) -> list[str]:
        """The [data.NAME] tables, one or several."""
        return [self.data] if isinstance(self.data, str) else self.data

    @property
    def objective(self) -> str:
        """The loss, as a plan tells it; "" where the kind says it all."""
        return ""


class Sft(Training, frozen=True, kw_only=True):
    """Supervised fine-tuning: cross-entropy of the trained tokens."""

    lora_rate: ClassVar[float] = 2e-4
    evaluated: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy")
    label_smoothing: Fraction = 0.0
    """Share of the target's probability spread over the whole vocabulary."""
    neftune_alpha: AtLeast0 = 0.0
    """Noise on embeddings, in training only, of scale alpha / sqrt(tokens · width) (NEFTune, arXiv 2310.05914)."""
    neftune_noise: Literal["uniform", "sign"] = "uniform"
    """The noise before it is scaled: uniform within ±1, or ±1 with equal chances (SymNoise, arXiv 2312.01523)."""
    r_drop: AtLeast0 = 0.0
    """Weight of R-Drop (arXiv 2106.14448): each batch is computed twice, under two draws of dropout and noise, and the
    loss is the mean of both cross-entropies and r_drop / 2 times the KL divergences of the two, one from the other."""
    router_loss: AtLeast0 | None = None
    """Weight of the loss that keeps the experts of a mixture evenly used (arXiv 2101.03961), as the model's own code
    computes it, over the tokens of each micro-batch. None: in full tuning what the model's config asks for with
    `output_router_logits`; 0 with an adapter, which leaves the routers as they are."""
    packing: bool = True
    """Lay rows end to end instead of padding them. Rows never see each other and the loss is the same.

    Before its first step a stage shows on its own model that this is so; where it is not, as in models with recurrent
    or convolutional mixers, rows are padded, and plan, log and result.json say so.
    """


class Pairwise(Training, frozen=True, kw_only=True):
    """What the stages that learn from pairs of answers have."""

    evaluated: ClassVar[tuple[str, ...]] = ("loss", "rewards/accuracy", "rewards/margin", "rewards/calibration_error")
    packing: bool = True
    """Lay answers end to end instead of padding them. They never see each other and the loss is the same."""
    share_prompt: bool = True
    """Compute what the two answers of a pair begin with once. The loss is the same. Needs packing."""


class Reward(Pairwise, frozen=True, kw_only=True):
    """Reward model: one number for an answer, read at its last token, the chosen one's above the rejected one's.

    The loss is -log σ(r_chosen - r_rejected - margin) (Bradley-Terry; arXiv 2203.02155, margin 2307.09288).
    """

    lora_rate: ClassVar[float] = 1e-4
    has_head: ClassVar[bool] = True
    margin: AtLeast0 = 0.0
    """The reward of the chosen answer must be larger by so much, times the pair's own margin (see the data table)."""
    centering: AtLeast0 = 0.0
    """Weight of (r_chosen + r_rejected)², which keeps rewards around 0; 0.01 does (arXiv 2312.09244)."""


class Dpo(Pairwise, frozen=True, kw_only=True):
    """Direct preference optimization against the policy that the stage starts from (arXiv 2305.18290)."""

    lora_rate: ClassVar[float] = 1e-5
    loss: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid"
    """"sigmoid" as in the paper; "ipo" squares the distance to 1 / (2·beta), per token (arXiv 2310.12036); "hinge" is
    SLiC's (arXiv 2305.10425); "robust" undoes the bias of labels wrong at the rate label_smoothing (2403.00409)."""
    beta: Above0 = 0.1
    """Strength of the pull towards the reference."""
    # Below 0.5: "robust" divides by 1 - 2·label_smoothing, and half of the labels wrong teach nothing.
    label_smoothing: Annotated[float, Meta(ge=0, lt=0.5)] = 0.0
    """Probability that a pair's label is wrong, for "sigmoid" (conservative DPO) and "robust"."""
    sft_weight: AtLeast0 = 0.0
    """Weight of the chosen answer's cross-entropy per token, added to the loss (RPO, arXiv 2404.19733)."""
    reference: Literal["live", "precomputed"] | None = None
    """"live" asks the frozen policy at each step: the base with the adapter off, or a copy of the adapter that the
    stage starts from. "precomputed" asks it for all pairs before the first step and keeps the answers on disk, where
    the next run finds them. Neither loads a second model. None: "live" with an adapter, else "precomputed"."""

    @property
    def objective(self) -> str:
        return f"{self.loss}, beta {self.beta:g}" + (f", {self.sft_weight:g} × SFT" if self.sft_weight else "")


class Orpo(Pairwise, frozen=True, kw_only=True):
    """Odds ratio preference optimization: SFT on the chosen answer and preference in one, without a reference
    (arXiv 2403.07691)."""

    lora_rate: ClassVar[float] = 8e-5
    beta: AtLeast0 = 0.1
    """Weight of the odds ratio loss in relation to the chosen answer's cross-entropy; the paper's lambda."""

    @property
    def objective(self) -> str:
        return f"cross-entropy of the chosen answer, {self.beta:g} × odds ratio; no reference"


SHIPPED_REWARDS = ("gsm8k",)
"""What `reward_function` may name without a file or module."""


class Ppo(Training, frozen=True, kw_only=True):
    """Proximal policy optimization: the policy answers prompts, each answer gets a score, and answers that score better
    than foreseen become more likely (arXiv 1707.06347, 2009.01325). Dropout is off."""

    lora_rate: ClassVar[float] = 3e-5
    evaluated: ClassVar[tuple[str, ...]] = ("reward",)
    has_head: ClassVar[bool] = True
    reward_function: FunctionName | None = None
    """Function that scores an answer: called with the prompt's text, the answer's text and the row, it returns a
    number. "FILE.py:NAME", with the file relative to the recipe, "package.module:NAME", or "gsm8k", which is shipped:
    1 where the answer's last number is the one in the row's field "answer", else 0."""
    reward_model: ModelName | None = None
    """Model that scores an answer: folder or hub id of a sequence classifier with one label, or the folder of a reward
    stage's artifact. None: the reward stage before this one, unless there is a `reward_function`."""
    reward_revision: Text | None = None
    """Commit, tag or branch of a `reward_model` of the hub. None is its main branch."""
    rollout_size: Positive | None = None
    """Prompts that are answered before their answers are trained on, over all processes. None: batch_size."""
    ppo_epochs: Positive = 4
    """Passes over the answers of a rollout, in mini-batches of `batch_size`."""
    max_new_tokens: Positive = 128
    """Longest answer in tokens."""
    rollout_engine: Literal["torch", "vllm"] = "torch"
    """What answers: the model that is trained, or vLLM, which is faster on a GPU, with a copy of the base in a process
    next to each rank. A resumed run then has other answers than it would have had."""
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
    """KL, in nats per answer, that the coefficient is steered towards (arXiv 1909.08593). None: it stays as it is."""
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
    """Write samples and their scores to samples.jsonl every so many rollouts, beginning with the first."""
    packing: bool = True
    """Lay rows end to end in scoring and training instead of padding them. The loss is the same."""


# A Kind but no Training: rules about data, batches and learning rates never see it.
class Merge(Kind, frozen=True, kw_only=True):
    """Folds the adapter into the base and checks the result against the adapter model."""

    start: Annotated[int, Meta(ge=0)] | Text | None = None
    """Stage whose adapter is folded: an earlier stage's kind, if only one has it, or its index from 0.
    None: the previous training stage."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Format of the merged weights. None: the base's own, as on disk."""
    max_shard_bytes: Annotated[int, Meta(ge=1_000_000)] = 5_000_000_000
    """Largest weight file. Memory stays within about one shard."""
    max_kl: Above0 | None = None
    """Largest mean KL divergence (nats per token) of the merged model from the adapter model, on fixed texts and rows
    held out. None: what the coarsest rounding on the way explains, in memory or on disk: 1e-5 of fp32, 0.01 of fp16,
    0.02 of bf16, 0.2 of a quantized base; and the model must be much nearer to the adapter model than the base is."""


Need = Literal["answers", "references", "choices", "pairs"]
"""What a metric looks at: what the model answers, or how likely it finds references, choices, or answers of pairs."""

METRICS: Final[dict[str, Need]] = {
    **dict.fromkeys(("bleu", "chrf", "nist", "cider", "rouge", "coco_rouge_l", "meteor_stem"), "answers"),
    **dict.fromkeys(("exact_match", "token_f1", "token_position_match", "final_number"), "answers"),
    "perplexity": "references",
    "multiple_choice": "choices",
    "preference_accuracy": "pairs",
}
"""The metrics that are shipped."""

EVAL_PROMPTS: Final = 64
"""Prompts that are answered at an evaluation, where `eval_prompts` names no number."""
EVAL_NEW_TOKENS: Final = 128
"""Tokens of such an answer at most, where `eval_max_new_tokens` names no number."""
EVAL_BATCH: Final = 16
"""Answers to held-out prompts that one process generates at the same time."""
SCORES: Final[dict[str, tuple[str, ...]]] = {
    **{metric: (metric,) for metric, need in METRICS.items() if need == "answers"},
    "rouge": ("rouge1", "rouge2", "rougeL", "rougeLsum"),
    "coco_rouge_l": ("rouge_l",),
}
"""What the metrics of answers call their scores."""
LOWER_IS_BETTER = ("loss", "perplexity", "rewards/calibration_error")
"""Scores of which less is better; of all others more is."""


class Evaluate(Kind, frozen=True, kw_only=True):
    """Generates answers to the held-out prompts and scores them, next to those of the base. Nothing is trained."""

    data: Name
    """Name of a [data.NAME] table. Its rows held out are asked; all of them where `test` is 0."""
    # msgspec copies an empty list for each struct and refuses any other as a default: hence the factory.
    metrics: Annotated[list[MetricName], Meta(min_length=1)] = field(default_factory=lambda: ["bleu", "nist", "rouge"])
    """bleu, chrf, nist, cider, rouge, coco_rouge_l, meteor_stem (without synonyms), exact_match, token_f1,
    token_position_match, final_number (GSM8K), perplexity, multiple_choice, preference_accuracy; or a file or folder
    with a metric of the `evaluate` library, or one of the hub, pinned: "owner/name@COMMIT". All references of a prompt
    count."""
    start: Annotated[int, Meta(ge=0)] | Text | None = None
    """Stage whose result is evaluated: an earlier stage's kind, if only one has it, or its index from 0; "base" is the
    plain model. None: the previous training stage, reward stages left out."""
    compare: bool = True
    """Evaluate the base, too, and tell the difference with its interval."""
    prompts: Positive | None = None
    """Take at most so many prompts. None: all."""
    max_new_tokens: Positive = 128
    """Longest answer in tokens."""
    batch_size: Positive = 16
    """Answers that one process generates side by side."""
    temperature: AtLeast0 = 0.0
    """0 takes the likeliest token each time; above, tokens are drawn, with logits divided by it."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Tokens are drawn from the likeliest ones that make up this probability. Needs a temperature."""
    beams: Positive = 1
    """Beam search over so many beginnings of answers; 1 is greedy."""
    choices_field: Text | None = None
    """Field of a row with its list of choices, for "multiple_choice"."""
    label_field: Text | None = None
    """Field with the right choice, for "multiple_choice": its index from 0, its letter, or its text."""
    resamples: NonNegative = 1000
    """Resamples of the prompts that the 95 % intervals come from (bootstrap). 0 gives none."""
    parallel: Parallel | None = None
    """Processes, each with a whole copy of the model and a share of the prompts. None: those of [parallel], or one
    where its strategy is "zero3"."""


Stage = Sft | Reward | Dpo | Orpo | Ppo | Merge | Evaluate
