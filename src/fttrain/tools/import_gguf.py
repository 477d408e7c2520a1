"""`ftlaunch import` of a GGUF file: a safetensors folder that everything else here loads."""

import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ftlaunch.errors import UserError
from ftlaunch.run.files import folder_by_rename, require_empty
from ftlaunch.safety import trust
from ftlaunch.tools import ImportOptions
from fttrain.model.scorer import DTYPES
from fttrain.tools.output import run


def convert(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Dequantize a GGUF model and write config, weights and tokenizer to `out`, which appears when it is whole.

    Raises UserError for a file that is missing or that transformers cannot read, or an `out` that is not empty.
    """
    if not source.is_file():
        raise UserError(f"{source} does not exist", "name a .gguf file")
    require_empty(out)
    trust.require(source)
    model, tokenizer = _read(source)
    with folder_by_rename(out) as partial:
        model.to(dtype).save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _read(source: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="ftlaunch-") as alone:  # transformers would read what lies next to the file
        Path(alone, source.name).symlink_to(source.resolve())
        place = {"pretrained_model_name_or_path": alone, "gguf_file": source.name, "trust_remote_code": False}
        try:
            tokenizer = AutoTokenizer.from_pretrained(**place)
            read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        except (ValueError, OSError, KeyError, struct.error) as error:
            raise UserError(
                f"{source} cannot be read as GGUF: {error}", "is it whole, and of a known family?"
            ) from error
    # The config that was read still calls itself quantized, and such a model refuses to be saved.
    fields = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = type(read)(type(read.config)(**fields))
    model.load_state_dict(read.state_dict())
    return model, tokenizer


def main(options: ImportOptions) -> Iterator[str]:
    """Write the folder and say so."""
    convert(Path(options.source), Path(options.out), DTYPES[options.dtype])
    yield f"{options.out}: ready for model.path"


if __name__ == "__main__":
    run(main, ImportOptions)
