"""`ftlaunch import` of what `ftlaunch quantize --packed` has written: a plain model folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftlaunch.errors import UserError
from ftlaunch.run.files import folder_by_rename, require_empty
from ftlaunch.tools import UnpackOptions
from fttrain import hub
from fttrain.model.families import auto_class
from fttrain.model.scorer import load_tokenizer
from fttrain.quant import packing
from fttrain.tools.output import run


def main(options: UnpackOptions) -> Iterator[str]:
    """Write the folder and say so."""
    unpack(Path(options.source), Path(options.out))
    yield f"{options.out}: ready for model.path"


def unpack(folder: Path, out: Path) -> None:
    """Write a plain model folder from a packed one: the very weights that were measured. Raises UserError."""
    from transformers import AutoConfig

    if not (folder / packing.CARD).exists():
        raise UserError(f"{folder} holds no {packing.CARD}", "name a folder that `ftlaunch quantize --packed` has made")
    require_empty(out)
    tokenizer = load_tokenizer(str(folder))
    dtype = packing.dtype_of(folder)
    config = AutoConfig.from_pretrained(hub.tokenizer_folder(str(folder)), trust_remote_code=False)
    model: Any = auto_class(config).from_config(config, dtype=dtype)
    # strict=False, as tied weights are stored once: the asserts below hold that nothing else is missing.
    missing, unexpected = model.load_state_dict(packing.load(folder, dtype), strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= set(model.all_tied_weights_keys), missing
    model.tie_weights()
    with folder_by_rename(out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


if __name__ == "__main__":
    run(main, UnpackOptions)
