"""`ftlaunch push`, as `python -m fttrain.tools.push OPTIONS.json`: what a run has made, sent to the hub."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from ftlaunch.errors import UserError
from ftlaunch.recipe.names import has_form_of_id
from ftlaunch.run.layout import CARD
from ftlaunch.safety.redact import has_secret
from ftlaunch.tools import PushOptions
from fttrain import artifact
from fttrain.noise import replace_activations
from fttrain.tools.output import run

SENT = {".safetensors", ".json", ".jinja", ".txt", ".model", ".md"}
"""Endings of what is sent."""
KEPT_BACK = {CARD}
"""Files that speak of this machine and of nothing else."""
WEIGHTS = ".safetensors"
MIB = 1 << 20


def main(options: PushOptions) -> Iterator[str]:
    """Send a model's or an adapter's folder; tells what goes, and where it is then. UserError where it may not go."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    folder = Path(options.folder)
    try:
        validate_repo_id(options.repository)
    except HFValidationError as error:
        raise UserError(f"{options.repository} is no name of a repository", "write OWNER/NAME") from error
    # Before anything is said or sent, so that a refusal leaves no repository on the hub.
    _refuse_what_others_compute_otherwise(folder)
    files = list(_files(folder))
    branch = f", branch {options.revision}" if options.revision else ""
    yield f"to {options.repository} ({'public' if options.public else 'private'}{branch}):"
    yield from (f"  {path.name}  {path.stat().st_size / MIB:,.1f} MiB" for path in files)
    if left := sorted({path.name for path in folder.iterdir()} - {path.name for path in files}):
        yield f"not sent: {', '.join(left)}"
    if (base := _local_base(folder)) is not None:
        yield f"note: adapter_config.json names its base by a folder of this machine, {base}: others cannot load it so"
    if options.dry_run:
        yield "nothing has been sent"
        return
    yield _send(files, options)


def _refuse_what_others_compute_otherwise(folder: Path) -> None:
    """Raise UserError for an adapter that plain PEFT, which does not read our card, would put on another function."""
    if not ((folder / "adapter_config.json").exists() and (folder / CARD).exists()):
        return
    base, _ = artifact.read(folder)
    own = {"replaced activation functions": replace_activations.read(folder), "rounded weights": base.rounding}
    if missing := " and ".join(part for part, there in own.items() if there):
        message = f"the adapter in {folder} was trained on a base with {missing}, which PEFT does not make"
        raise UserError(message, "merge it, and push the merged model")


def _local_base(folder: Path) -> str | None:
    """The base that an adapter names by a folder; None for a hub id, and for whole models."""
    config = folder / "adapter_config.json"
    base = json.loads(config.read_text()).get("base_model_name_or_path") if config.exists() else None
    return base if base and not has_form_of_id(base) else None


def _files(folder: Path) -> Iterator[Path]:
    """What goes. UserError where there are no weights, or where a text holds what looks like a secret."""
    found = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    files = [path for path in found if path.suffix in SENT and path.name not in KEPT_BACK]
    if not any(path.suffix == WEIGHTS for path in files):
        raise UserError(f"{folder} holds no weights", "name a run, or the folder of a model or an adapter")
    for path in files:
        # Weights are numbers; reading gigabytes of them as text would find chance hits only.
        if path.suffix != WEIGHTS and has_secret(path.read_text(errors="replace")):
            raise UserError(f"{path} holds what looks like a secret", "take it out of the file; nothing was sent")
    yield from files


def _send(files: list[Path], options: PushOptions) -> str:
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    # What it is made of: the errors of the HTTP library that is in use, and the system's.
    failures = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    token = get_token()
    if token is None:
        raise UserError("there is no token for the hub", "sign in by `hf auth login`, or set HF_TOKEN")
    hub: Any = HfApi(token=token)
    try:
        where = hub.create_repo(options.repository, private=not options.public, exist_ok=True)
        if options.revision is not None:
            hub.create_branch(options.repository, branch=options.revision, exist_ok=True)
        hub.upload_folder(
            repo_id=options.repository,
            folder_path=options.folder,
            revision=options.revision,
            allow_patterns=[path.name for path in files],
            commit_message="Weights and card, by ftlaunch",
        )
    except failures as error:
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        remedy = "check the name, your rights to it and the network; then call it again"
        raise UserError(f"the hub has not taken {options.repository}: {said}", remedy) from error
    return f"sent: {where}"


if __name__ == "__main__":
    run(main, PushOptions)
