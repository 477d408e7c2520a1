"""Whether rows may be packed for a model, and one pass of its body over packed rows."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from ftlaunch.errors import UserError
from fttrain.data.segments import Segments
from fttrain.model import attention, borders
from fttrain.model.attention import Unpackable
from fttrain.model.borders import Mixer, Packed
from fttrain.model.halves import Halves

STATEFUL = re.compile(
    "Mamba|Recurrent|Rglru|GatedDelta|DeltaNet|DeltaAttention|LinearAttention|LightningAttention|Rwkv|xLSTM|mLSTM|sLSTM"
    "|ShortConv|Conv1d"
)
"""Classes of mixers with a state of their own, which runs on from row to row."""
ELSEWHERE = re.compile("vision|visual|image|audio|speech|projector")
"""Parts of multimodal models that text does not go through."""
STRETCHES = "turns the positions of all rows of a micro-batch by the longest of them"
REMEDY = "write packing = false (and share_prompt = false) in the stage: its rows are then padded"


def refusal(causal: Any) -> str | None:
    """Return why rows may not be packed for this model, as a text after its name; None where no reason is known."""
    return _refusal(causal, borders.mixers(causal))


def _refusal(causal: Any, mixers: list[Mixer]) -> str | None:
    has_attention = not mixers or any("Attention" in type(module).__name__ for module in causal.modules())
    if causal.config._attn_implementation != attention.NAME and has_attention:
        return "attends by code of its own"
    for mixer in mixers:
        if mixer.lack is not None:
            return f"{_runs_on(mixer.module)}: {mixer.lack}"
    for name, module in causal.named_modules():
        kind = type(module).__name__
        if "Indexer" in kind:
            return "chooses the keys of a query by rank, among all that lie in its line"
        if not STATEFUL.search(kind) or ELSEWHERE.search(name.lower()) or "Norm" in kind or borders.attends(module):
            continue
        if not any(_is_within(name, mixer.name) or _is_within(mixer.name, name) for mixer in mixers):
            return _runs_on(module)
    return None


def _runs_on(mixer: Any) -> str:
    return f"carries a state from token to token ({type(mixer).__name__}), which runs on into the next row"


def _is_within(name: str, holder: str) -> bool:
    return not holder or f"{name}.".startswith(f"{holder}.")


def stretches_beyond(causal: Any) -> int | None:
    """Longest row that leaves rotary embeddings as they are: a longer one turns all rows of its micro-batch otherwise.

    None where no row does. "dynamic" and "longrope" scale their frequencies by the longest row (arXiv 2402.13753).
    """
    config = causal.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(one for one in rope.values() if isinstance(one, dict))]
    scaled = [one for one in kinds if one.get("rope_type") in ("dynamic", "longrope")]
    if not scaled:
        return None
    holders = [config.max_position_embeddings, getattr(config, "original_max_position_embeddings", None)]
    return min(int(one) for one in [*holders, *(one.get("original_max_position_embeddings") for one in scaled)] if one)


def forget_lengths(model: Any) -> None:
    """Let no row be turned by the length of one that was computed before it, as "dynamic" rotary embeddings do."""
    for module in model.modules():
        if "dynamic" in str(getattr(module, "rope_type", "")):
            module.register_forward_pre_hook(_forget)


def _forget(rotary: Any, _: Any) -> None:
    # transformers computes frequencies where a row is longer than the longest so far; with 0, for every row. Some
    # families have a number for each kind of layer.
    for name in [name for name in vars(rotary) if name.endswith("max_seq_len_cached")]:
        setattr(rotary, name, 0)


def pass_over(halves: Halves, asked: dict[str, Any], segments: Segments) -> Any:
    """What the body says of packed rows, hidden states [1, T, D]. UserError where it does not keep them apart."""
    halves.packed = packed = halves.packed or require(halves.causal)
    try:
        with attention.over(segments, asked["position_ids"]) as made, borders.required(packed.mixers):
            passed = halves.body(use_cache=False, **asked, **borders.told(packed.mixers, segments))
    except Unpackable as error:
        raise _refused(halves.causal, str(error)) from error
    # A layer that never called `attend` has attended across rows by some code of its own, without an error.
    if made.calls < packed.attending:
        raise _refused(halves.causal, f"attends as it is told in only {made.calls} of {packed.attending} layers")
    return passed


def own_attention(causal: Any) -> str:
    """Return the attention that transformers chooses by default: for the text part, where a model has others."""
    kind = type(causal.config.get_text_config())
    parts = [part for part in causal.modules() if isinstance(part, PreTrainedModel) and type(part.config) is kind]
    return "sdpa" if all(part._supports_sdpa for part in parts or [causal]) else "eager"


@contextmanager
def by_itself(causal: Any) -> Iterator[None]:
    """Within, the model uses transformers' own attention, for padded rows and with a cache."""
    held = causal.config._attn_implementation
    if held == attention.NAME:
        causal.set_attn_implementation(own_attention(causal))
    try:
        yield
    finally:
        if held == attention.NAME:
            causal.set_attn_implementation(held)


def require(causal: Any) -> Packed:
    """Return what passes over packed rows need. Raises UserError where `refusal` knows a reason."""
    mixers = borders.mixers(causal)
    if (why := _refusal(causal, mixers)) is not None:
        raise _refused(causal, why)
    return Packed(mixers, _attending(causal) if mixers else _layers(causal))


def require_short(causal: Any, longest: int) -> None:
    """Raise UserError where a row of this length would change the others in its line."""
    if (limit := stretches_beyond(causal)) is not None and longest > limit:
        raise _refused(causal, f"{STRETCHES}, where one is longer than {limit} tokens")


def _refused(causal: Any, why: str) -> UserError:
    return UserError(f"{causal.config.model_type} cannot be trained on packed rows: it {why}", REMEDY)


def _attending(causal: Any) -> int:
    """Return how many modules attend, in a model that has mixers of other kinds, too."""
    return sum(borders.attends(one) and not ELSEWHERE.search(name.lower()) for name, one in causal.named_modules())


def _layers(causal: Any) -> int:
    """Return how many layers must attend in every pass; 1 where the model skips layers at random."""
    config = causal.config.get_text_config()
    return 1 if getattr(config, "layerdrop", 0) else getattr(config, "num_hidden_layers", 1)
