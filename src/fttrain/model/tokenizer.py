"""A tokenizer as its own tokenizer.json has it, whatever class the config names."""

import json
import logging
from pathlib import Path
from typing import Any

from fttrain import hub

log = logging.getLogger(__name__)

PIPELINE = ("normalizer", "pre_tokenizer", "decoder")
"""Parts of a tokenizer that some classes of transformers make anew instead of reading them."""


def load(path: str, revision: str | None = None) -> Any:
    """The tokenizer in a folder or of a hub id, with the ids that its tokenizer.json gives.

    Raises UserError where it asks for code or is not to be trusted, OSError or ValueError where it cannot be had.
    """
    from transformers import AutoTokenizer
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

    folder = hub.tokenizer_folder(path, revision)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not (changed := _rebuilt(tokenizer, folder)):
        return tokenizer
    name = type(tokenizer).__name__
    log.info("%s would tokenize otherwise than tokenizer.json does (%s): the file counts", name, ", ".join(changed))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
    if changed := _rebuilt(tokenizer, folder):
        raise ValueError(f"the tokenizer cannot be read as its tokenizer.json has it: {', '.join(changed)} differ")
    return tokenizer


def _rebuilt(tokenizer: Any, folder: Path) -> list[str]:
    """The parts in which the tokenizer is not that of the folder's tokenizer.json; none where there is no such file."""
    file = folder / "tokenizer.json"
    if not (file.exists() and tokenizer.is_fast):
        return []
    told, ours = json.loads(file.read_text(encoding="utf-8")), json.loads(tokenizer.backend_tokenizer.to_str())
    return [part for part in PIPELINE if told.get(part) != ours.get(part)]
