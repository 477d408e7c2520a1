"""The probe: before its first step a stage checks that it computes what the model's own `forward` computes.

Two rows of random tokens, one longer than the model's shortest window, and a third that begins like the first are
computed by the model itself, row by row, and in the layout of training. Where log-probabilities differ by more than
rounding explains, the stage uses a slower layout that is right, or ends with an error. Collective; a few forward passes
of short rows.
"""

import logging
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ftlaunch.errors import UserError
from fttrain import adapters
from fttrain.data.batches import Layout, MicroBatch, collate
from fttrain.data.token_set import Group, Tokens
from fttrain.engine import Engine
from fttrain.model import packing
from fttrain.model.scorer import Trial

FLOORS = {"fp32": 2e-4, "fp16": 1e-2, "bf16": 5e-2}
"""Mean |Δ log p|, in nats per token, that rounding explains in any model, by number format."""
CEILINGS = {"fp32": 2e-3, "fp16": 0.1, "bf16": 0.25}
"""The most that rounding may explain in a model whose own rounding is large."""
UNMOVED = {"fp32": 2e-4, "fp16": 1e-3, "bf16": 4e-3}
"""The same of a row that lies where it lay, next to a row with other tokens: the same kernels compute it."""
MARGIN = 4.0
"""Two ways of computing a model may differ by this many times its own rounding."""
SHORT, USUAL, LONGEST = 19, 40, 2048
"""Tokens of the short row, of the long one, and of the long one at most where it must outgrow a window."""
TRIED = 24
"""Tokens at the end of each row that are compared."""
OTHER = 9
"""Tokens in which the third row differs from the first."""
FOLLOWING = 3
"""Tokens that follow a row where the model must not see them."""
NOBODY = "nobody"
"""A name that no adapter has: with it, the bare base is computed."""
FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What the code of a model raises where it does not suit the rows."""
LIMITS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention", "index_topk")
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What the probe found; part of result.json."""

    layout: str
    """"packed", "padded", or "alone" where each row has to be computed by itself."""
    share_prompt: bool
    bound: float
    """Largest mean |Δ log p|, in nats per token, that counts as the same."""
    rounding: float
    """Mean |Δ log p| of the model from itself when a few tokens follow a row."""
    differences: dict[str, float]
    """Mean |Δ log p| of each trial, by name; a layout that the model refused has none."""
    warnings: list[str]
    passes: int
    """Forward passes of the model that were made."""
    tokens: int
    """Tokens in them, padding included: a forward pass costs 2 floating-point operations per weight and token."""
    seconds: float


class Probe:
    """One model under trial. Every method is called by all ranks together."""

    def __init__(self, engine: Engine, dtype: str) -> None:
        self._engine = engine
        self._scorer = engine.scorer
        self._own = not adapters.leads(self._scorer.model)
        self._rows = _rows(self._scorer.causal.config)
        self.differences: dict[str, float] = {}
        self.warnings: list[str] = []
        self.passes = self.tokens = 0
        self._expected = torch.cat([self._alone(row) for row in self._rows])
        # Causal attention ignores what follows, so any difference is rounding: another length takes another kernel.
        first = self._rows[0]
        whole = _unchanged(self._scorer.causal, first)
        expected = self._expected[: int(first[1].sum())] if whole is first else self._alone(whole)
        self.rounding = self._mean(self._alone(_followed(whole)) - expected)
        self.bound = min(max(FLOORS[dtype], MARGIN * self.rounding), CEILINGS[dtype])
        # In int8 a feature is rounded otherwise for all tokens as soon as it is large in one of them (LLM.int8).
        in_int8 = getattr(self._scorer.causal, "is_loaded_in_8bit", False)
        self._bound_unmoved = self.bound if in_int8 else min(self.bound, max(UNMOVED[dtype], MARGIN * self.rounding))

    @property
    def family(self) -> str:
        return self._scorer.causal.config.model_type

    def is_same(self, name: str, layout: Layout) -> bool:
        """Return whether rows in this layout give what they give alone, whatever the end of the first of them says.

        Raises UserError if the model refuses them.
        """
        first, short, third = self._rows
        # Rows that share a prefix must be neighbours, which changes the order of the results.
        order = [0, 2, 1] if layout.share else [0, 1, 2]
        expected = self._expected.split([int(row[1].sum()) for row in self._rows])
        # A rank whose machine alone refuses must not leave the others in a pass, or at the collective after it.
        if layout.packing:
            self._agreed(lambda: packing.require(self._scorer.causal))
        found = self._agreed(lambda: self._ask(_laid_out(self._rows, layout), layout, own=False))
        if not self._is_within(name, found - torch.cat([expected[place] for place in order])):
            return False
        # A little that leaks from a row into the next is lost in the rounding of 16 bits, until only the leak differs.
        other = [_ended_otherwise(first, short), short, third]
        moved = self._agreed(lambda: self._ask(_laid_out(other, layout), layout, own=False))
        rest = len(expected[0])
        return self._is_within(f"{name}, next to another row", moved[rest:] - found[rest:], self._bound_unmoved)

    def _agreed(self, trial: Callable[[], T]) -> T:
        """What a trial gives on this rank. Raises UserError on all ranks if it does on one."""
        found, refusal = None, None
        try:
            found = trial()
        except UserError as error:
            refusal = error.message
        if (told := next(filter(None, self._engine.world.gather(refusal)), None)) or found is None:
            raise UserError(str(told), packing.REMEDY)
        return found

    def is_head_right(self) -> bool:
        """Return whether a single row gives in training what the model's own `forward` gives."""
        short = self._rows[1]
        found = self._ask([Group((short,))], Layout(packing=False), own=False)
        return self._is_within("head", found - self._alone(short))

    def is_identity(self) -> bool:
        """Return whether the adapter changes nothing yet, as a new one must."""
        short = self._rows[1]
        with adapters.using_adapter(self._scorer.model, NOBODY):
            bare = self._alone(short)
        return self._is_within("adapter", bare - self._alone(short))

    def is_still(self) -> bool:
        """Return whether a row gives in training mode what it gives in evaluation: no dropout, no noise."""
        short = self._rows[1]
        with torch.no_grad():
            found = self._compute([Group((short,))], self._engine.layout, own=False)
        return self._is_within("training mode", found - self._ask([Group((short,))], self._engine.layout, own=False))

    def require_balance(self) -> None:
        """Raise UserError where the model's own code fails to compute the loss that balances its experts."""
        try:
            with torch.no_grad():
                self._engine.forward(self._laid([Group((self._rows[1],))], self._engine.layout))
        except FAULTS as error:
            if _is_beyond_the_model(error):
                raise
            message = f"{self.family} fails on the loss that balances experts ({type(error).__name__}: {error})"
            raise UserError(message, "write router_loss = 0 in the stage") from error

    def _alone(self, row: Tokens) -> Tensor:
        return self._ask([Group((row,))], Layout(packing=False), own=self._own)

    def _ask(self, groups: list[Group], layout: Layout, *, own: bool) -> Tensor:
        with self._engine.evaluating():
            return self._compute(groups, layout, own=own)

    def _compute(self, groups: list[Group], layout: Layout, *, own: bool) -> Tensor:
        micro = self._laid(groups, layout)
        try:
            return self._engine.forward(Trial(micro, own))
        except FAULTS as error:
            if _is_beyond_the_model(error):
                raise
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            tokens = max(len(ids) for group in groups for ids, _ in group.rows)
            message = f"{self.family} fails on a row of {tokens} random tokens ({type(error).__name__}: {said})"
            remedy = "use a base of another family; if plain transformers computes such a row, please report this model"
            raise UserError(message, remedy) from error

    def _laid(self, groups: list[Group], layout: Layout) -> MicroBatch:
        device = self._engine.world.device
        micro = collate(groups, packing=layout.packing, share=layout.share, chunks=1, device=device)
        self.passes += 1
        self.tokens += micro.input_ids.numel()
        return micro

    def _mean(self, difference_N: Tensor) -> float:
        found = float(difference_N.abs().mean())
        # Whether the largest of a number and NaN is NaN depends on their order.
        return self._engine.world.max(found if math.isfinite(found) else math.inf)

    def _is_within(self, name: str, difference_N: Tensor, bound: float | None = None) -> bool:
        self.differences[name] = found = self._mean(difference_N)
        return math.isfinite(found) and found <= (self.bound if bound is None else bound)


def _is_beyond_the_model(error: Exception) -> bool:
    """Return whether memory ran out, or the error was raised where ranks talk to each other."""
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, torch.OutOfMemoryError) or "distributed" in innermost or "deepspeed" in innermost


def settle(
    engine: Engine, wanted: Layout, dtype: str, known: list[str], *, begins_as_base: bool, has_reference: bool = False
) -> Verdict:
    """Choose the engine's layout: the wanted one, or the next slower one that is right for the model.

    `known` are warnings that come before the probe's own. `begins_as_base` says that the adapter must change nothing
    yet; `has_reference` that what training computes is compared with what evaluation does. Raises UserError where no
    layout is right.
    """
    started = time.perf_counter()
    probe = Probe(engine, dtype)
    if not probe.rounding <= MARGIN * CEILINGS[dtype]:
        raise UserError(
            f"{probe.family} cannot be trained to go on with a text: tokens change what it says of those before them"
            f" ({probe.rounding:.2g} nats per token)",
            "use a base that reads from left to right, such as llama, qwen3, mistral or gemma3",
        )
    if not probe.is_head_right():
        raise _wrong(probe, "head", "logits of its last hidden states differ from those of its own forward")
    if begins_as_base and not probe.is_identity():
        raise _wrong(probe, "adapter", "a new adapter changes its output before anything is trained")
    probe.warnings += known
    layout = _packed(probe, wanted) if wanted.packing else None
    alone = False
    if layout is None:
        engine.scorer.pad()
        layout, alone = Layout(packing=False), _must_be_alone(engine, probe)
    engine.layout = layout
    if engine.scorer.router_weight:
        probe.require_balance()
    if has_reference and not probe.is_still():
        found = probe.differences["training mode"]
        probe.warnings.append(
            f"dropout or noise moves the policy by {found:.2g} nats per token and not its reference: log-ratios have"
            " that noise from the first step on"
        )
    for warning in probe.warnings if engine.world.is_main else ():
        log.warning("%s", warning)
    return Verdict(
        layout="alone" if alone else "packed" if layout.packing else "padded",
        share_prompt=layout.share,
        bound=probe.bound,
        rounding=probe.rounding,
        differences=probe.differences,
        warnings=probe.warnings,
        passes=probe.passes,
        tokens=probe.tokens,
        seconds=round(time.perf_counter() - started, 3),
    )


def _packed(probe: Probe, wanted: Layout) -> Layout | None:
    """Return the wanted layout, without shared prompts if they are wrong; None where packed rows are wrong at all."""
    why = "packed rows give other results than single rows"
    ways = [wanted, Layout(packing=True)] if wanted.share else [wanted]
    for layout in ways:
        try:
            if probe.is_same("shared" if layout.share else "packed", layout):
                if layout != wanted:
                    probe.warnings.append(f"{probe.family}: shared prompts change results; share_prompt is off")
                return layout
        except UserError as error:
            why = error.message
    probe.warnings.append(f"{probe.family}: rows are padded instead of packed, as {why}")
    return None


def _must_be_alone(engine: Engine, probe: Probe) -> bool:
    """Return whether each row has to be computed by itself. Raises UserError where that is wrong, too."""
    scorer = engine.scorer
    if probe.is_same("padded", Layout(packing=False)):
        if scorer.is_alone:
            probe.warnings.append(f"{probe.family}: each row is computed by itself, as padding would change results")
        return scorer.is_alone
    scorer.compute_alone()
    if not probe.is_same("alone", Layout(packing=False)):
        raise _wrong(probe, "alone", "even single rows give other results than its own forward")
    probe.warnings.append(f"{probe.family}: padding changes a row's results, so each row is computed by itself")
    return True


def _wrong(probe: Probe, name: str, why: str) -> UserError:
    found = probe.differences[name]
    message = f"{probe.family} would be trained wrongly: {why} ({found:.2g} nats per token, {probe.bound:.2g} allowed)"
    return UserError(message, "use a base of another family, or an adapter of another kind; please report this model")


def _rows(config: Any) -> list[Tokens]:
    """Return three rows whose last tokens count as trained: a long one, a short one, and one that begins like it."""
    # The long row outgrows the shortest window by a few tokens: a layout that ignores the window then shows.
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or LONGEST
    most = min(LONGEST, positions) if positions > 0 else LONGEST  # XLNet's config says -1
    told = [getattr(text, name, None) for name in LIMITS]
    told += dict(getattr(text, "compress_rates", None) or {}).values()
    limits = [limit for limit in told if isinstance(limit, int) and limit > 0]
    within = [limit + OTHER + 1 for limit in limits if limit + OTHER + 1 <= most]
    long = min(most, max([USUAL, *within]))
    short = min(SHORT, long)
    draw = np.random.Generator(np.random.PCG64(0))
    ids = draw.choice(_plain_tokens(config, text), size=long + short + OTHER)
    first, other = ids[:long], ids[long : long + short]
    third = np.concatenate([first[:-OTHER], ids[-OTHER:]])
    return [_tried(first, TRIED), _tried(other, TRIED), _tried(third, OTHER + 1)]


def _laid_out(rows: list[Tokens], layout: Layout) -> list[Group]:
    """Return the three rows as groups; the third shares the first's prompt where the layout shares prompts."""
    first, short, third = rows
    return [Group((first, third)), Group((short,))] if layout.share else [Group((row,)) for row in rows]


def _ended_otherwise(row: Tokens, by: Tokens) -> Tokens:
    """Return the row with its last tokens replaced by as many of another row's; which of them count stays as it is."""
    ids, trained = row
    return np.concatenate([ids[:-OTHER], by[0][-OTHER:]]), trained


def _tried(ids: np.ndarray, count: int) -> Tokens:
    return ids.astype(np.int32), np.arange(len(ids)) >= max(1, len(ids) - count)


def _unchanged(causal: Any, row: Tokens) -> Tokens:
    """Return as much of the row as later tokens leave alone by design.

    Of keys chosen by rank equal ones fall anyhow once there are too many, and some positions are turned by the row's
    length.
    """
    config = causal.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("index_topk", "keep_window_size")]
    limits.append(packing.stretches_beyond(causal))
    if not (told := [limit for limit in limits if limit]):
        return row
    return _tried(row[0][: max(4, min(told) - FOLLOWING)], TRIED)


def _followed(row: Tokens) -> Tokens:
    """Return the row with a few tokens after it, which are not compared."""
    ids, trained = row
    return np.concatenate([ids, ids[:FOLLOWING]]), np.concatenate([trained, np.zeros(FOLLOWING, dtype=bool)])


def _plain_tokens(config: Any, text: Any) -> np.ndarray:
    """Return the token ids without those that the config names, such as those of images, padding and EOS."""
    keys = {**config.to_dict(), **text.to_dict()}
    # Inkling's head leaves out the padding of its vocabulary, Gemma 3n has a second table of fewer tokens.
    sizes = [keys.get(name) for name in ("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input")]
    special = [id_ for name, id_ in keys.items() if name.endswith(("token_id", "token_index")) and isinstance(id_, int)]
    return np.setdiff1d(np.arange(min(size for size in sizes if size)), special)
