"""The code of a run as it was when the run was submitted: what is edited while its jobs wait changes nothing.

Two things are copied into the run's folder: the packages that the jobs import, and the project, which is the git
checkout that the recipe lies in, uncommitted files included. Files that a recipe names are then read there.
"""

import importlib.util
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from ftlaunch.backend.slurm import paths
from ftlaunch.errors import UserError
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.recipe.stages import Evaluate, Ppo, Training
from ftlaunch.run.files import folder_by_rename, write_json
from ftlaunch.run.layout import RunDir
from ftlaunch.run.provenance import Provenance, git
from ftlaunch.run.snapshot import Snapshot

FILE_BYTES, ALL_BYTES = 4 << 20, 64 << 20
"""A file that is larger is no code, and is left where it is; more than so much in all is refused."""
PACKAGES = ("ftlaunch", "fttrain")


def take(run: RunDir, source: Path, recipe: Recipe) -> None:
    """Copy packages and project into a run's folder, in place of what is there. UserError where they are too large."""
    # Measured before anything is copied: a project that is too large leaves the run's folder as it was.
    copies = _project_copies(source.absolute(), recipe)
    take_packages(run)
    _copy(copies, run.code)
    files = {str(original): f"{run.code.name}/{copy}" for original, copy in copies.items()}
    write_json(run.code_index, Snapshot(files=files))


def retake(run: RunDir, recipe: Recipe) -> None:
    """Copy them again for a run that is submitted again, the project where it is still there. UserError as above."""
    recorded = msgspec.json.decode(run.provenance.read_bytes(), type=Provenance).recipe
    if (source := Path(recorded)).exists():
        take(run, source, recipe)
    else:
        take_packages(run)


def take_packages(run: RunDir) -> None:
    """Copy the packages that a run's jobs import, ftlaunch and its trainer."""
    _copy(dict(_package_files()), paths.packages(run))


def _copy(copies: Mapping[Path, Path], folder: Path) -> None:
    """Fill a folder, under a temporary name first, with files that nobody else may write."""
    with folder_by_rename(folder, durable=False) as partial:
        for below in sorted({copy.parent for copy in copies.values()}):
            (partial / below).mkdir(parents=True, exist_ok=True)
        for original, copy in copies.items():
            # copyfile takes the content and not the mode, which may let others write.
            shutil.copyfile(original, partial / copy)
        # As late as possible: the rename that follows takes no folder that holds anything.
        shutil.rmtree(folder, ignore_errors=True)


def _package_files() -> Iterator[tuple[Path, Path]]:
    for package in PACKAGES:
        if (spec := importlib.util.find_spec(package)) and spec.origin:
            root = Path(spec.origin).parent
            # A .pyc is valid for the time of its source, which a copy does not keep.
            files = (path for path in root.rglob("*") if path.is_file() and path.parent.name != "__pycache__")
            yield from ((path, path.relative_to(root.parent)) for path in files)


def _project_copies(source: Path, recipe: Recipe) -> dict[Path, Path]:
    """Each file to be copied, and where to below the folder of copies."""
    project = _project(source.parent)
    found = {path: path.relative_to(project) for path in _project_files(project)} if project else {}
    named = [path for path in _named(recipe) if path not in found and path.is_file()]
    # Numbered, as two files may have one name. No file of the project is hidden, so none is in .named.
    found |= {path: Path(f".named/{number}/{path.name}") for number, path in enumerate(named)}
    size = sum(path.stat().st_size for path in found)
    if size > ALL_BYTES:
        message = (
            f"{project} holds {size >> 20} MiB in {len(found)} files that git does not ignore, which jobs would copy"
        )
        raise UserError(message, f"list what is not code in {project}/.gitignore, to stay below {ALL_BYTES >> 20} MiB")
    return found


def _project(folder: Path) -> Path | None:
    top = git(folder, "rev-parse", "--show-toplevel")
    # Not strip(), as a folder's name may end with a blank.
    return Path(top.decode().removesuffix("\n")) if top else None


def _project_files(project: Path) -> Iterator[Path]:
    """Tracked and uncommitted files, without hidden ones, links, and those too large for code."""
    # -z: without it git puts names with unusual characters in quotes.
    listed = git(project, "ls-files", "-z", "--cached", "--others", "--exclude-standard") or b""
    for name in sorted({*listed.decode(errors="surrogateescape").split("\0")} - {""}):
        path = project / name
        hidden = any(part.startswith(".") for part in Path(name).parts)
        # git also lists tracked files that have been deleted.
        if not hidden and path.is_file() and not path.is_symlink() and path.stat().st_size <= FILE_BYTES:
            yield path


def _named(recipe: Recipe) -> Iterator[Path]:
    """Files of code that a recipe names."""
    for stage in recipe.stage:
        if isinstance(stage, Ppo) and stage.reward_function:
            yield Path(stage.reward_function.rpartition(":")[0])
        metrics = stage.metrics if isinstance(stage, Evaluate) else []
        if isinstance(stage, Training):
            metrics = stage.eval_metrics
        yield from (Path(metric) for metric in metrics if Path(metric).is_absolute())
    yield from (Path(data.template) for data in recipe.data.values() if Path(data.template).is_absolute())
