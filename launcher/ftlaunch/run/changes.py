"""What a run began with and is not the same any more: its data and its base, by the digests that were recorded."""

from fnmatch import fnmatch
from pathlib import Path

import msgspec
from msgspec import Struct

from ftlaunch.errors import UserError
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.run import digests, provenance
from ftlaunch.run.files import read_json, write_json
from ftlaunch.run.layout import RunDir
from ftlaunch.run.provenance import Provenance
from ftlaunch.run.spec import StageSpec

NAMED = 3
"""Files that are named."""


class _Recorded(Struct):
    """What is compared of a provenance."""

    # msgspec skips the other fields, so provenances of other versions can be compared.
    data: dict[str, str] = {}
    base: dict[str, str] = {}


def changes(run: RunDir, *, at_most: int | None = None) -> list[str]:
    """One line for each file that has changed, is gone or has come since the run began; [] where none was recorded.

    Files of more than `at_most` bytes are left alone where their digest would have to be taken again.
    """
    return list(_changes(run, at_most).values())


def changed_under(run: RunDir, spec: StageSpec) -> list[str]:
    """The same lines for the files that one stage reads: its data sets, their templates and its base."""
    datas = provenance.data_read(spec.data)
    places = {spec.model.path, *(place for data in datas for place in (data.path, data.template))}
    # A place is a file, a folder or a pattern.
    return [
        told
        for path, told in _changes(run, None).items()
        if any(path == place or path.startswith(f"{place}/") or fnmatch(path, place) for place in places)
    ]


def _changes(run: RunDir, at_most: int | None) -> dict[str, str]:
    recorded = read_json(run.provenance, _Recorded) or _Recorded()
    before = recorded.data | recorded.base
    if not before:
        return {}
    recipe = msgspec.json.decode(run.resolved.read_bytes(), type=Recipe)
    files = [*_found(recipe), *(provenance.base_files(recipe) if recorded.base else [])]  # earlier versions had no base
    files += [file for file in provenance.template_files(recipe) if str(file) in before]  # and no templates
    left_alone = {str(file) for file in files if at_most is not None and _is_too_much(file, at_most)}
    now = digests.sha256_of(file for file in files if str(file) not in left_alone)
    # Without those left alone: they have no digest in `now` and would count as gone.
    differ = (path for path in sorted((before | now).keys() - left_alone) if before.get(path) != now.get(path))
    return {path: _what_became_of(path, before.get(path), now.get(path)) for path in differ}


def _found(recipe: Recipe) -> list[Path]:
    try:
        return provenance.data_files(recipe)
    except UserError:
        return []  # a file or folder is gone, and so are those in it


def _is_too_much(file: Path, at_most: int) -> bool:
    return file.stat().st_size > at_most and not digests.is_kept(file)


def _what_became_of(path: str, before: str | None, now: str | None) -> str:
    how = "has been added" if before is None else "is gone" if now is None else "has changed"
    return f"{path} {how} since the run began"


def require_unchanged(run: RunDir) -> None:
    """UserError where the run would go on with other data or another base than it began with."""
    if found := changes(run):
        more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
        raise UserError(
            f"{run.path.name}: {'; '.join(found[:NAMED])}{more}",
            f"put back what was there, or go on with what is: ftlaunch resume {run.in_shell} --changed",
        )


def accept(run: RunDir) -> list[str]:
    """Record what is there now as what the run goes on with; returns what has changed."""
    found = changes(run)
    if found:
        recorded = msgspec.json.decode(run.provenance.read_bytes(), type=Provenance)
        recipe = msgspec.json.decode(run.resolved.read_bytes(), type=Recipe)
        data = digests.sha256_of([*provenance.data_files(recipe), *provenance.template_files(recipe)])
        base = digests.sha256_of(provenance.base_files(recipe))
        write_json(run.provenance, msgspec.structs.replace(recorded, data=data, base=base))
    return found + _unpinned(run)


def _unpinned(run: RunDir) -> list[str]:
    """Forget the commits of the hub that the run began with, so that its next stage asks for the newest ones."""
    if not run.commits.exists():
        return []
    commits = msgspec.json.decode(run.commits.read_bytes(), type=dict[str, str])
    run.commits.unlink()
    return [f"{name} is no longer kept at commit {commit}" for name, commit in commits.items()]
