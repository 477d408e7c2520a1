"""The base model, its tokenizer, and the module that scores tokens with it."""

import inspect
import re
from dataclasses import dataclass
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ftlaunch.errors import UserError
from ftlaunch.recipe.model import Model
from ftlaunch.recipe.names import is_local
from ftlaunch.safety.model_files import has_safetensors, require_weights_to_train
from fttrain import adapters, hub
from fttrain.adapters.targets import token_table
from fttrain.data.batches import MicroBatch
from fttrain.model import attention, borders, classifier, completeness, packing, sharded, tokenizer
from fttrain.model.families import auto_class_in
from fttrain.model.halves import Halves
from fttrain.model.packing import forget_lengths
from fttrain.noise import replace_activations
from fttrain.noise.hooks import ActivationNoise
from fttrain.noise.row_index import Places
from fttrain.objectives.logps import Scores, score
from fttrain.objectives.r_drop import r_drop

COMPUTED_WITH = re.compile(r"self\.(\w+)\.weight(?:\s*@|(?:\.data)?\.clamp)")
"""Layers with whose weights a family's code computes as matrices, as Mamba does with dt_proj: they stay in 16 bits."""
UNSHARDED = 'if it loads in one process, write strategy = "zero2"'
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """Return the tokenizer in a folder or of a hub id. Raises UserError where there is none."""
    try:
        return tokenizer.load(path, revision)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer could be loaded from {path}: {_lines(error, 1)}", remedy(path)) from error


def load_base(spec: Model, *, dtype: torch.dtype, packing: bool) -> nn.Module:
    """Return the base as a causal language model in `dtype`, on the CPU unless it is quantized on a GPU.

    `packing` chooses the attention that packed rows need. Raises UserError where the model cannot be had, run so or
    trusted, and where its files lack weights or have others.
    """
    options: dict[str, Any] = {"dtype": dtype}
    replace_activations.make_known()
    try:
        folder = hub.model_folder(spec.path, spec.revision, allow_pickle=spec.allow_pickle)
        require_weights_to_train(folder)
        auto, family = auto_class_in(folder)
        if spec.is_quantized:
            options["quantization_config"] = _quantization(str(spec.quantization), dtype, family)
            if torch.cuda.is_available():
                options["device_map"] = {"": torch.cuda.current_device()}
        with sharded.whole_shapes():
            loaded: Any = auto.from_pretrained(
                folder,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                use_safetensors=has_safetensors(folder),
                trust_remote_code=False,
                attn_implementation=attention.NAME if packing and hasattr(family, "ALL_ATTENTION_FUNCTIONS") else None,
                **options,
            )
    except (OSError, ValueError, ImportError, UnpicklingError) as error:
        message = f"no model could be loaded from {spec.path}: {_lines(error, 1)}"
        raise UserError(
            message, remedy(spec.path) + (f"; {UNSHARDED}" if is_deepspeed_zero3_enabled() else "")
        ) from error
    except (LookupError, RuntimeError) as error:  # such as the shape of a weight that ZeRO-3 holds elsewhere
        if isinstance(error, RuntimeError) and "loading state_dict" not in str(error):
            raise
        raise UserError(
            f"transformers fails to load the model of {spec.path} ({type(error).__name__}: {_lines(error, 2)})",
            f"{UNSHARDED}; otherwise use a base of another family",
        ) from error
    model, found = loaded
    completeness.require(spec.path, model, found)
    model.name_or_path = model.config._name_or_path = spec.path  # an adapter names its base by it
    model.config._commit_hash = None if is_local(spec.path) else folder.name  # snapshots are called by their commits
    model.config.use_cache = False
    forget_lengths(model)
    _prepare(model)
    return model


def _prepare(model: nn.Module) -> None:
    """Have layers leave their weights as they are, whether they train or not."""
    layers: list[Any] = list(model.modules())
    for module in layers:
        # In evaluation on a CPU bitsandbytes would repack 4-bit weights for good, rounding their scales to bf16.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if type(module).__name__ == "Linear8bitLt":
            module.register_forward_pre_hook(_keep_scales)
        # RWKV halves weights in place when it is evaluated, and adapters on them would not follow.
        if hasattr(module, "layers_are_rescaled"):
            module._rescale_layers = _as_they_are


def _as_they_are() -> None:
    """Leave the layers as they are."""


def _keep_scales(layer: Any, _: Any) -> None:
    """Give an int8 weight on a CPU its scales back.

    bitsandbytes moves the scales to the layer's state in the first pass; after PEFT's DoRA has read and moved the
    weight, the layer looks for them on the weight again.
    """
    if layer.weight.CB is not None and layer.weight.SCB is None:
        layer.weight.SCB = layer.state.SCB


def _quantization(kind: str, dtype: torch.dtype, family: ModuleType | None) -> Any:
    from transformers import BitsAndBytesConfig

    computed = sorted(set(COMPUTED_WITH.findall(inspect.getsource(family)))) if family is not None else []
    # A list replaces transformers' own, which has the head.
    kept = [*computed, "lm_head"] if computed else None
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        llm_int8_skip_modules=kept,
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # ZeRO-3 can only shard what is stored in the compute dtype
    )


def _lines(error: Exception, count: int) -> str:
    """Return the first lines of what an error says, as one."""
    lines = (str(error).strip() or type(error).__name__).splitlines()[:count]
    return " ".join(line.strip() for line in lines)


def remedy(path: str) -> str:
    """Return what to do where no model or tokenizer could be loaded from a folder or hub id."""
    if is_local(path):
        return "the folder must hold config.json, model.safetensors (or its shards) and the tokenizer's files"
    return (
        f"check the hub id (a folder is written ./{path}), your access to it (`hf auth login`) and the network; "
        "or download it and give its folder"
    )


class Scorer(nn.Module):
    """A causal language model that returns the scores of trained tokens instead of logits.

    DDP and DeepSpeed wrap this module: body, head and scores are computed in one forward, so their hooks see all of it.
    """

    def __init__(self, model: nn.Module, *, smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.places = Places()
        """Where the rows of the micro-batch that is being computed lie."""
        self.disturbance = ActivationNoise()
        """The noise that the model's activations have in training."""
        self.router_weight = 0.0
        """Weight of the loss that balances experts, in training."""
        self._smoothing = smoothing
        self._halves: dict[int, Halves] = {}
        self._trained_head = any(p.requires_grad for p in self._of(self.causal).head_parameters())

    def forward(self, inputs: Any) -> Any:
        """Return what `answer` computes of a micro-batch, or the log-probabilities of a `Trial`."""
        return self._tried(inputs) if isinstance(inputs, Trial) else self.answer(inputs)

    def answer(self, micro: MicroBatch) -> Any:
        """Scores of the micro-batch's trained tokens, N of them."""
        if not self.router_weight or not self.training:
            return self._scores(self._hidden(micro)[micro.positions_N], micro)
        passed = self._pass(micro, output_router_logits=True)
        scores = self._scores(passed.last_hidden_state.flatten(0, 1)[micro.positions_N], micro)
        return scores._replace(router_loss=self.router_weight * self._balance(passed, micro))

    def _balance(self, passed: Any, micro: MicroBatch) -> Tensor:
        """The loss that balances experts over the micro-batch's tokens, padding left out."""
        has_padding = micro.segments is None and not self.is_alone and bool(micro.targets_N.numel())
        mask_BT = (micro.lengths > 0).long() if has_padding else None
        return self._of(self.causal).router_loss(passed, mask_BT)

    def _scores(self, hidden_ND: Tensor, micro: MicroBatch, *, with_entropy: bool = False) -> Scores:
        return score(
            hidden_ND,
            micro.targets_N,
            self._logits,
            trained_head=self._trained_head,
            chunks=micro.chunks,
            smoothing=self._smoothing if self.training else 0.0,
            with_entropy=with_entropy,
        )

    def pad(self) -> None:
        """Use transformers' own attention in all models of this one; rows must be padded from now on."""
        for causal in self._causals():
            if causal.config._attn_implementation == attention.NAME:
                causal.set_attn_implementation(packing.own_attention(causal))

    def compute_alone(self) -> None:
        """Compute each padded row by itself from now on."""
        for causal in self._causals():
            self._of(causal).alone = True

    @property
    def is_alone(self) -> bool:
        """Whether each padded row is computed by itself."""
        return self._of(self.causal).alone

    @property
    def body(self) -> Any:
        """The part that turns tokens into hidden states."""
        return self._of(self.causal).body

    @property
    def causal(self) -> Any:
        """The transformers model, under PEFT's wrapper if there is one."""
        wrapped: Any = self.model
        return wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped

    def _causals(self) -> list[Any]:
        return [self.causal]

    def _tried(self, trial: "Trial") -> Tensor:
        micro, causal = trial.micro, self.causal
        with packing.by_itself(causal) if micro.segments is None else borders.as_in_training(borders.mixers(causal)):
            if trial.own:
                logits_NV = causal(input_ids=micro.input_ids, use_cache=False).logits.flatten(0, 1)[micro.positions_N]
            else:
                logits_NV = self._of(causal).logits(self._hidden(micro)[micro.positions_N])
        return logits_NV.float().log_softmax(-1).gather(1, micro.targets_N[:, None])[:, 0]

    def _hidden(self, micro: MicroBatch) -> Tensor:
        """Return the body's hidden states, [lines · T, D]."""
        return self._pass(micro).last_hidden_state.flatten(0, 1)

    def _pass(self, micro: MicroBatch, **options: Any) -> Any:
        """Return the body's output, with hidden states [lines, T, D]."""
        self.places.take(micro.lengths, micro.position_ids)
        halves = self._of(self.causal)
        positions_BT = halves.positions(micro.position_ids)
        inputs: dict[str, Any] = {"input_ids": micro.input_ids, "position_ids": positions_BT, **options}
        virtual = 0
        if adapters.leads(self.model):
            from fttrain.adapters import virtual_tokens

            assert micro.segments is None, "the launcher asks for padded rows"
            inputs, virtual = virtual_tokens.led(self.model, micro.input_ids, positions_BT)
        # Beyond this length the longest row changes what the model says of the others.
        limit = packing.stretches_beyond(halves.causal)
        is_stretched = limit is not None and int(micro.lengths.max()) > limit
        if micro.segments is None and (halves.alone or is_stretched) and not virtual:
            return _row_by_row(halves.body, micro, options)
        if micro.segments is None:
            passed = halves.body(use_cache=False, **inputs)
            if virtual:
                passed.last_hidden_state = passed.last_hidden_state[:, virtual:]
            return passed
        if is_stretched:
            packing.require_short(halves.causal, int(micro.lengths.max()))
        return packing.pass_over(halves, inputs, micro.segments)

    def _of(self, causal: Any) -> Halves:
        if id(causal) not in self._halves:
            self._halves[id(causal)] = Halves(causal)
        return self._halves[id(causal)]

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        return self._of(self.causal).logits(hidden_ND)


@dataclass(frozen=True)
class Trial:
    """A request of the probe: the log-probabilities of a micro-batch's trained tokens, N of them."""

    micro: MicroBatch
    own: bool
    """Whether the model's whole `forward` computes them, of a single row; otherwise it is done as in training."""


def _row_by_row(body: Any, micro: MicroBatch, options: dict[str, Any]) -> Any:
    """Return the body's output, computed row by row, with hidden states [lines, T, D] that are 0 on padding."""
    # Under ZeRO-3 each call gathers weights from all ranks, so all call the body equally often. The result of an empty
    # call is added with factor 0: its backward pass gathers, too, and must happen.
    lengths = micro.lengths[:, 0].clamp(min=1).tolist()
    rows = [ids[None, :n] for ids, n in zip(micro.input_ids, lengths, strict=True)]
    passed = [body(input_ids=row, use_cache=False, **options) for row in rows]
    hidden_BTD = pad_sequence([one.last_hidden_state[0] for one in passed], batch_first=True)
    for _ in range(len(passed), micro.lines):
        nothing = body(input_ids=micro.input_ids[:1, :1], use_cache=False).last_hidden_state
        hidden_BTD = hidden_BTD + 0 * nothing
    whole = passed[0]
    if options:
        by_layer = zip(*(one.router_logits for one in passed), strict=True)
        whole.router_logits = tuple(torch.cat([one.flatten(0, -2) for one in layer]) for layer in by_layer)
    whole.last_hidden_state = hidden_BTD
    return whole


class RDropScorer(Scorer):
    """A Scorer for R-Drop: in training it computes each micro-batch twice, with different dropout."""

    def __init__(self, model: nn.Module, *, smoothing: float, weight: float) -> None:
        super().__init__(model, smoothing=smoothing)
        self._weight = weight

    def answer(self, micro: MicroBatch) -> Any:
        """`RDropScores` in training, plain scores in evaluation."""
        if not self.training:
            return super().answer(micro)
        hidden_2ND = self._hidden(micro)[micro.positions_N], self._hidden(micro)[micro.positions_N]
        return r_drop(
            hidden_2ND,
            micro.targets_N,
            self._logits,
            weight=self._weight,
            smoothing=self._smoothing,
            chunks=micro.chunks,
        )


class RewardHead(nn.Module):
    """A linear head with one output, computed in fp32 in any number format of the model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, width).normal_(std=(width + 1) ** -0.5))

    def forward(self, hidden_BD: Tensor) -> Tensor:
        # A matrix product would be done in 16 bits under autocast.
        return (hidden_BD.float() * self.weight.float()).sum(-1)


class RewardModel(Scorer):
    """A causal language model's body with a head that computes one number from each row's last hidden state.

    `score` is transformers' own name for that head in a sequence classification model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        classifier.architecture(self.causal.config.model_type)
        embedding = token_table(self.causal)
        self.score = RewardHead(self._of(self.causal).width)
        for parameter in self.causal.get_output_embeddings().parameters():
            if parameter is not embedding.weight:  # no logits are computed, so the language-model head has no gradient
                parameter.requires_grad_(False)

    def answer(self, micro: MicroBatch) -> Tensor:
        """Return the reward of each row, [B]."""
        return self.score(self._hidden(micro)[micro.last_token_B])
