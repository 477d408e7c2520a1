"""Models on their way in: fetched, then judged, and only then loaded, from the very folder that was judged."""

from pathlib import Path

from ftlaunch.errors import UserError
from ftlaunch.safety import model_files, trust

CONFIGS = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
PICKLED = ["pytorch_model*.bin"]


def tokenizer_folder(path: str, revision: str | None = None) -> Path:
    """The folder with a tokenizer's files, fetched from the hub where `path` is an id.

    Raises UserError where it asks for code or is not to be trusted, OSError or ValueError where it cannot be had.
    """
    folder = _fetch(path, revision, CONFIGS)
    _judge(folder, allow_pickle=True)  # no weights are looked at
    return folder


def model_folder(path: str, revision: str | None = None, *, allow_pickle: bool = False) -> Path:
    """The folder with a model's files, fetched from the hub where `path` is an id; nothing is run or unpickled.

    Raises as `tokenizer_folder` does, also where the weights are pickled and that is not allowed, or it is an adapter.
    """
    folder = _fetch(path, revision, CONFIGS)
    _judge(folder, allow_pickle=True)
    if (folder / model_files.ADAPTER_CONFIG).exists():
        raise UserError(f"{path} is an adapter, not a model", "merge it into its base, and name what that makes")
    if not Path(path).is_dir():
        weights = model_files.shard_names(folder) or [model_files.WEIGHTS]
        folder = _fetch(path, revision, [*CONFIGS, *weights, *(PICKLED if allow_pickle else [])])
        _refuse_pickles_of_the_hub(path, folder, allow_pickle=allow_pickle)
    _judge(folder, allow_pickle=allow_pickle)
    return folder


def adapter_folder(path: Path) -> Path:
    """The folder of an adapter, judged. Raises UserError where it is not to be trusted or its weights are pickled."""
    folder = path.resolve()
    _judge(folder, allow_pickle=False)
    return folder


def _judge(folder: Path, *, allow_pickle: bool) -> None:
    trust.require(folder)
    model_files.require_plain(folder, allow_pickle=allow_pickle)


def _fetch(path: str, revision: str | None, patterns: list[str]) -> Path:
    if Path(path).is_dir():
        return Path(path).resolve()  # what is judged is what is loaded, wherever a link may lead by then
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))


def _refuse_pickles_of_the_hub(path: str, folder: Path, *, allow_pickle: bool) -> None:
    """Pickles are not even fetched: that safetensors are missing is what tells of them."""
    if not model_files.has_safetensors(folder) and not allow_pickle:
        raise UserError(
            f"no safetensors can be had of {path}, and loading a pickle can run code", model_files.UNPICKLED
        )
