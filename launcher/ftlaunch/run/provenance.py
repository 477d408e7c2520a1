"""Where a run came from: code, versions, machine and data. No environment and no command line: they hold secrets."""

import hashlib
import platform
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from ftlaunch.recipe.data import Data
from ftlaunch.recipe.names import is_local
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.recipe.stages import Training
from ftlaunch.run import digests
from ftlaunch.safety.redact import redact

PACKAGES = (
    *("torch", "deepspeed", "accelerate", "transformers", "peft"),
    *("bitsandbytes", "datasets", "safetensors", "evaluate", "ftlaunch"),
)

# Nothing that a checkout's own configuration names may run: no external diff, no text conversion, no monitor.
GIT = ("git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
DIFF = ("diff", "HEAD", "--binary", "--no-ext-diff", "--no-textconv")

# Weights, configs, tokenizers and chat templates: a README or a picture changes no model.
BASE_SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt", ".gguf"}


class Provenance(Struct, frozen=True, kw_only=True):
    """What provenance.json holds."""

    recipe: str
    """The file that was run."""
    commit: str | None
    """Commit of the checkout that the recipe lies in; None where it lies in none."""
    diff_sha256: str | None
    """Digest of the uncommitted changes to tracked files; None where there are none."""
    packages: dict[str, str]
    """Installed versions."""
    python: str
    platform: str
    host: str
    data: dict[str, str]
    """Local data files and chat templates, and the SHA-256 of each."""
    base: dict[str, str] = {}
    """Files of local bases and the SHA-256 of each."""


def collect(recipe: Recipe, source: Path) -> Provenance:
    """The provenance of a run of a recipe, read from `source`, on this machine as it is now."""
    folder = source.absolute().parent
    diff = git(folder, *DIFF)
    return Provenance(
        recipe=redact(str(source.absolute())),
        commit=(git(folder, "rev-parse", "HEAD") or b"").decode().strip() or None,
        diff_sha256=hashlib.sha256(diff).hexdigest() if diff else None,
        packages={name: version for name, version in installed().items() if version},
        python=platform.python_version(),
        platform=platform.platform(),
        host=socket.gethostname(),
        data=digests.sha256_of([*data_files(recipe), *template_files(recipe)]),
        base=digests.sha256_of(base_files(recipe)),
    )


def base_files(recipe: Recipe) -> list[Path]:
    """The files of the recipe's local bases; what comes from the hub has a commit of its own."""
    models = [recipe.model, *(stage.model for stage in recipe.stage if isinstance(stage, Training) and stage.model)]
    # Loading a recipe makes local paths absolute, so a relative one is a hub id.
    bases = {Path(model.path) for model in models if is_local(model.path)}
    files = {file for base in bases for file in (base.iterdir() if base.is_dir() else [base])}
    return sorted(file for file in files if file.suffix in BASE_SUFFIXES and file.is_file())


def git(folder: Path, *arguments: str) -> bytes | None:
    """What git says in a folder; None where there is no git, no checkout or no commit."""
    try:
        done = subprocess.run([*GIT, "-C", str(folder), *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def installed() -> dict[str, str]:
    """The version of each package that training needs; empty text where it is missing, as torch on a login node."""
    from importlib import metadata  # slow to import, and only a run's start and the doctor need it

    found = {name: [*metadata.distributions(name=name)] for name in PACKAGES}
    return {name: of[0].version if of else "" for name, of in found.items()}


def data_files(recipe: Recipe) -> list[Path]:
    """The files on this machine that the recipe's data tables read, those for evaluation too.

    A checked recipe has absolute paths for them; a relative one is a hub id, whatever folder may be called like it.
    """
    from ftlaunch.rows import files  # not needed where a run is only looked at

    local = [data for data in data_read(recipe.data) if is_local(data.path)]
    return sorted({file for data in local for file in files.data_files(Path(data.path), data.split)})


def data_read(tables: Mapping[str, Data]) -> list[Data]:
    """What is read by data tables: their own rows, and those for evaluation."""
    from ftlaunch import rows

    return [data for table in tables.values() for data in (table, rows.for_evaluation(table)) if data is not None]


def template_files(recipe: Recipe) -> set[Path]:
    """The files of chat templates that the recipe's data tables name."""
    named = {Path(data.template) for data in recipe.data.values()}
    return {file for file in named if file.is_absolute() and file.is_file()}
