"""Whether the files of a model hold all of its weights and no others.

transformers only warns of that, and draws what is missing at random.
"""

import logging
import re
from collections.abc import Iterable
from typing import Any

from ftlaunch.errors import UserError
from fttrain.adapters import targets
from fttrain.model.packing import ELSEWHERE

BUFFERS = ("inv_freq", ".masked_bias", ".attn.bias", ".attention.bias", "position_ids")
"""Ends of names under which old checkpoints keep tensors that are computed today."""
FORESEEING = re.compile(r"(^|\.)(mtp|nextn|eagle)")
"""Heads that foresee several tokens, which neither training nor the model's own `forward` uses."""
NAMED = 3
"""Names that a message lists; the others are counted."""
log = logging.getLogger(__name__)


def require(path: str, model: Any, found: dict[str, Any], *, has_other_head: bool = False) -> None:
    """Raise UserError where weights are missing, of other shapes, or left over in the part that text goes through.

    `found` is what `from_pretrained` tells with `output_loading_info`. `has_other_head`: the files may hold a head that
    this model does without, as those of a classifier may still hold the language model's.
    """
    family = model.config.model_type
    mismatched = [str(key[0] if isinstance(key, tuple) else key) for key in found["mismatched_keys"]]
    if missing := sorted({*found["missing_keys"], *mismatched}):
        why = "have other shapes in" if mismatched else "are missing from"
        raise UserError(
            f"{_listed(missing)} of the {family} model {why} the files of {path}, and would be drawn at random",
            "download the model again, and compare its config.json with its files; if they are complete in one process,"
            ' write strategy = "zero2", as ZeRO-3 loads weights of some families under other names',
        )
    if has_other_head:
        return
    left = [key for key in found["unexpected_keys"] if not key.endswith(BUFFERS)]
    elsewhere = [key for key in left if ELSEWHERE.search(key.lower()) or FORESEEING.search(key)]
    if other := sorted(set(left) - set(elsewhere)):
        raise UserError(
            f"{_listed(other)} in the files of {path} belong to no part of a {family} model, and would be left out",
            "its config.json names another architecture than its files hold: compare the two, or use another base",
        )
    if elsewhere:
        log.warning("%s: %d weights of parts that text does not go through are not loaded", path, len(elsewhere))


def _listed(names: Iterable[str]) -> str:
    shown = targets.collapsed(names)
    more = f" and {len(shown) - NAMED} more" if len(shown) > NAMED else ""
    return ", ".join(shown[:NAMED]) + more
