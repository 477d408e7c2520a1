"""Loading a tokenizer exactly as its tokenizer.json says, whatever class the config names."""

import json
import logging
from pathlib import Path
from typing import Any

from fttrain import hub

log = logging.getLogger(__name__)

PIPELINE = ("normalizer", "pre_tokenizer", "decoder")
"""Parts of a tokenizer that some classes of transformers build themselves instead of reading them."""


def load(path: str, revision: str | None = None) -> Any:
    """Return the tokenizer in a folder or of a hub id, with the ids that its tokenizer.json gives.

    Raises UserError where it needs its own code or cannot be trusted, OSError or ValueError where it cannot be loaded.
    """
    from transformers import AutoTokenizer
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

    folder = hub.tokenizer_folder(path, revision)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not (changed := _rebuilt(tokenizer, folder)):
        return tokenizer
    name = type(tokenizer).__name__
    log.info("%s would tokenize differently from tokenizer.json (%s): the file is used", name, ", ".join(changed))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
    if changed := _rebuilt(tokenizer, folder):
        raise ValueError(f"the tokenizer cannot be read as its tokenizer.json has it: {', '.join(changed)} differ")
    return tokenizer


def _rebuilt(tokenizer: Any, folder: Path) -> list[str]:
    """Return the parts in which the tokenizer differs from the folder's tokenizer.json; [] without that file."""
    file = folder / "tokenizer.json"
    if not (file.exists() and tokenizer.is_fast):
        return []
    told, ours = json.loads(file.read_text(encoding="utf-8")), json.loads(tokenizer.backend_tokenizer.to_str())
    return [part for part in PIPELINE if told.get(part) != ours.get(part)]
