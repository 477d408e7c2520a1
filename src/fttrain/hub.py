"""Models from disk or the hub: fetched, then vetted, and only then loaded, from the very folder that was vetted.

Names are settled ones: an absolute path, or a hub id (`ftlaunch.recipe.names`).
"""

from pathlib import Path

from ftlaunch.errors import UserError
from ftlaunch.recipe.names import is_local
from ftlaunch.safety import model_files, trust

CONFIGS = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
PICKLED = ["pytorch_model*.bin"]


def commit_of(path: str, revision: str | None) -> str:
    """Return the commit of a hub model that its revision names; of what is cached here, where the hub is not reached.

    Raises UserError where neither is to be had.
    """
    try:
        return _fetch(path, revision, ["config.json"]).name  # …/snapshots/COMMIT
    except (OSError, ValueError) as error:
        said = str(error).partition("\n")[0]
        remedy = "check the id, the revision and the network; a private model needs `hf auth login`"
        raise UserError(f"the model {path} cannot be had: {said}", remedy) from error


def tokenizer_folder(path: str, revision: str | None = None) -> Path:
    """Return the folder with a tokenizer's files, fetched from the hub where `path` is an id.

    Raises UserError where it needs its own code or cannot be trusted, OSError or ValueError where it cannot be fetched.
    """
    folder = _fetch(path, revision, CONFIGS)
    _vet(folder, allow_pickle=True)  # no weights are read
    return folder


def model_folder(path: str, revision: str | None = None, *, allow_pickle: bool = False) -> Path:
    """Return the folder with a model's files, fetched from the hub where `path` is an id; nothing is executed.

    Raises as `tokenizer_folder` does, and where the weights are pickled and that is not allowed, or it is an adapter.
    """
    # The configs come first: a model that is refused must not cost a download of its weights.
    folder = _fetch(path, revision, CONFIGS)
    _vet(folder, allow_pickle=True)
    if (folder / model_files.ADAPTER_CONFIG).exists():
        raise UserError(f"{path} is an adapter, not a model", "merge it into its base, and name what that makes")
    if not is_local(path):
        weights = model_files.shard_names(folder) or [model_files.WEIGHTS]
        folder = _fetch(path, revision, [*CONFIGS, *weights, *(PICKLED if allow_pickle else [])])
        _refuse_pickles_of_the_hub(path, folder, allow_pickle=allow_pickle)
    _vet(folder, allow_pickle=allow_pickle)
    return folder


def adapter_folder(path: Path) -> Path:
    """Return an adapter's folder, vetted. Raises UserError where it cannot be trusted or its weights are pickled."""
    folder = path.resolve()
    _vet(folder, allow_pickle=False)
    return folder


def _vet(folder: Path, *, allow_pickle: bool) -> None:
    trust.require(folder)
    model_files.require_plain(folder, allow_pickle=allow_pickle)


def _fetch(path: str, revision: str | None, patterns: list[str]) -> Path:
    if is_local(path):
        if not Path(path).is_dir():
            raise UserError(f"there is no folder {path}", "correct the path, or move the model back to it")
        return Path(path).resolve()  # a link could lead elsewhere between vetting and loading
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))


def _refuse_pickles_of_the_hub(path: str, folder: Path, *, allow_pickle: bool) -> None:
    """Raise UserError where the hub has no safetensors: pickles were not even fetched."""
    if not model_files.has_safetensors(folder) and not allow_pickle:
        raise UserError(
            f"no safetensors can be had of {path}, and loading a pickle can run code", model_files.UNPICKLED
        )
