"""Which files a data table names: a file, a folder's files of one split, a pattern's, or what `datasets` saved."""

import glob
import json
import os
import re
from pathlib import Path
from typing import Final

from ftlaunch.recipe.names import KINDS, PACKED
from ftlaunch.rows.template import DataError

ENDINGS: Final = (*KINDS, *(kind + packed for kind in KINDS for packed in PACKED))
NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "requirements.txt")
"""Files that lie next to data and hold none."""
SAVED = ("state.json", "dataset_dict.json")
"""Files by which a folder that `save_to_disk` has written is known, whose own lists of files count."""

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in the names of files and folders → the split that they mark, as on the hub."""

# train-00000-of-00002.parquet; older files of the hub have a hash at the end.
SHARD = re.compile(r"(?P<split>\w+)-(?P<number>\d+)-of-(?P<count>\d+)(?:-\w+)?")
NO_SPLIT = ("part", "data", "shard", "chunk", "rows")
"""Names of shards that mark no split, as Spark and `datasets` give them."""
CONFIGURATION = re.compile(r"^[ -]*config_name:\s*(\S.*?)\s*$", re.MULTILINE)
"""What the head of a README.md, as data sets of the hub have it, calls one of several sets in the same folder."""

_SUPPORTED = (
    f"use {', '.join(KINDS[:-1])} or {KINDS[-1]}, or one of these with {', '.join(PACKED[:-1])} or {PACKED[-1]}"
)

_UNPACK = "unpack it, and name the folder or file that this makes"
_SAVE_AS = "save it as “CSV UTF-8”"
OTHER_KINDS = {
    **dict.fromkeys((".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar"), _UNPACK),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), _SAVE_AS),
    **dict.fromkeys((".feather", ".orc", ".avro", ".tfrecord", ".pkl", ".pickle", ".db", ".sqlite"), _SUPPORTED),
}
"""Endings of files that may hold rows and are not read → what to do about it."""


def is_pattern(path: str) -> bool:
    """Whether the path stands for all files that it matches, and for none by its very name."""
    # Brackets may simply be part of a name: "data[1].jsonl".
    return glob.has_magic(path) and not Path(path).exists()


def kind_of_file(path: Path) -> str:
    """The ending that tells what a file holds, as in `.csv` of facts.csv.gz; "" where it is not known."""
    # facts.csv.gz has two endings that count, facts.v2.csv only one.
    ends = [suffix.lower() for suffix in path.suffixes[-2:]]
    kind = ends[-2] if len(ends) == 2 and ends[-1] in PACKED else ends[-1] if ends else ""
    return kind if kind in KINDS else ""


def data_files(path: Path, split: str = "train") -> list[Path]:
    """The file itself, or the files of a split in a folder or among those that match, by name.

    A split is told by the names of files and folders; unmarked files are to train on. Raises DataError where there
    is none, or a folder may not be looked into.
    """
    path = path.expanduser()
    try:
        return _data_files(path, split)
    except OSError as error:
        place = str(error.filename or path)
        raise DataError(place, f"cannot be read: {error.strerror}", "correct the path or its permissions") from error


def _data_files(path: Path, split: str) -> list[Path]:
    if is_pattern(str(path)):
        return _of_split([file for file in _matching(path) if kind_of_file(file)], _fixed(path), path, split)
    if not path.exists():
        raise DataError(str(path), "no such file or folder", "check the path; relative ones count from where you are")
    if path.is_file():
        if not kind_of_file(path):
            remedy = OTHER_KINDS.get(path.suffix.lower(), _SUPPORTED)
            raise DataError(str(path), f"files of kind {path.suffix!r} are not read", remedy)
        return [path]
    if not path.is_dir():
        raise DataError(str(path), "is neither a file nor a folder", "name one of these: rows are read more than once")
    # `save_to_disk` puts these two files into a data set's folder, and dataset_dict.json above several splits.
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return _saved(path)
    if (path / "dataset_dict.json").is_file():
        return _saved_split(path, split)
    found = [file for file in _inside(path) if kind_of_file(file)]
    # Next to other data a .txt is mostly a note, so texts count only in a folder without anything else.
    texts = [file for file in found if kind_of_file(file) == ".txt"]
    _refuse_configurations(path)
    chosen = _of_split([file for file in found if file not in texts] or texts, path, path, split)
    # A part of the rows will do for an evaluation, as a sample of them does.
    if SPLITS.get(split.lower()) not in ("validation", "test"):
        _refuse_gaps(chosen, path)
    return chosen


def _refuse_configurations(folder: Path) -> None:
    """Raise DataError where a copy of the hub's data set holds several, of which the hub asks for one."""
    card = folder / "README.md"
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2) if card.is_file() else []
    names = dict.fromkeys(CONFIGURATION.findall(parts[1])) if len(parts) == 3 and not parts[0] else {}
    if len(names) > 1:
        message = f"README.md says that it holds several data sets: {', '.join(names)}"
        raise DataError(str(folder), message, f"name the folder of one, or its files by a pattern: {folder}/…/train-*")


def _refuse_gaps(files: list[Path], folder: Path) -> None:
    """Raise DataError where a file that others count, such as train-00001-of-00002, is not there."""
    found: dict[tuple[Path, str, str], set[int]] = {}
    for file in files:
        if shard := SHARD.fullmatch(file.name.partition(".")[0]):
            found.setdefault((file.parent, shard["split"], shard["count"]), set()).add(int(shard["number"]))
    for (inner, split, count), numbers in found.items():
        if len(numbers) < int(count):
            message = f"of {split}-*-of-{count} only {len(numbers)} of {int(count)} files are there"
            remedy = f"fetch the others, or name those that are there by a pattern: {inner}/{split}-*"
            raise DataError(str(folder), message, remedy)


def unread_files(path: Path, split: str = "train") -> list[Path]:
    """Files of a folder or pattern that may hold rows, and that `data_files` gives for no split."""
    path = path.expanduser()
    has_pattern = is_pattern(str(path))
    if not has_pattern and (path.is_file() or any((path / name).is_file() for name in SAVED)):
        return []
    read = set(data_files(path, split))
    found, folder = (_matching(path), _fixed(path)) if has_pattern else (_inside(path), path)
    # A .txt next to other data is mostly a note.
    wanted = [file for file in found if _may_hold_rows(file) and _holds_rows(file.name.lower())]
    candidates = [file for file in wanted if file not in read and kind_of_file(file) != ".txt"]
    return [file for file in candidates if not kind_of_file(file) or _mark(file.relative_to(folder)) is None]


def _matching(pattern: Path) -> list[Path]:
    names = glob.glob(str(pattern), recursive=True)  # noqa: PTH207 Path.glob takes no absolute pattern
    return sorted(Path(name) for name in names if Path(name).is_file())


def _fixed(pattern: Path) -> Path:
    """The folder before a pattern's first wildcard: what comes after it may mark a split."""
    parts = list(pattern.parts)
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def _inside(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders that may hold rows, hidden ones left out.

    OSError where a folder may not be looked into.
    """
    found: list[Path] = []
    reached = {folder.resolve(), *folder.resolve().parents}
    # rglob passes over linked folders, and over those that it may not look into.
    for inner, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        # A link may lead to a folder that holds it, and two of them to the same one.
        named = sorted((Path(inner, name).is_symlink(), name) for name in folders if not name.startswith("."))
        whole = {Path(inner, name).resolve(): name for _, name in reversed(named)}
        folders[:] = [name for place, name in whole.items() if place not in reached]
        reached |= whole.keys()
        files = [Path(inner, name) for name in names if _holds_rows(name.lower())]
        found += [file for file in files if _may_hold_rows(file) and file.is_file()]
    return sorted(found)


def _may_hold_rows(file: Path) -> bool:
    return bool(kind_of_file(file)) or file.suffix.lower() in OTHER_KINDS


def _holds_rows(name: str) -> bool:
    return name not in NO_ROWS and not name.startswith((".", "~$", "readme", "license"))


def _raise(error: OSError) -> None:
    raise error


def _of_split(files: list[Path], folder: Path, named: Path, split: str) -> list[Path]:
    if not files:
        raise DataError(str(named), "there are no data files", _SUPPORTED)
    marks = {file: _mark(file.relative_to(folder)) for file in files}
    wanted = SPLITS.get(split.lower(), split)
    if chosen := [file for file in files if marks[file] == wanted]:
        return _of_one_kind(chosen)
    if wanted == "train" and (unmarked := [file for file in files if marks[file] is None]):
        return _of_one_kind(unmarked)
    there = sorted({mark for mark in marks.values() if mark is not None})
    message = f"no file is of the split {split!r}; by their names they are {', '.join(there) or 'of none'}"
    remedy = f"write split = {there[0]!r} if those are meant, or name a file itself" if there else "remove split"
    raise DataError(str(named), message, remedy.replace("'", '"'))


def _of_one_kind(files: list[Path]) -> list[Path]:
    """The files, if no two differ in their kind alone: such hold the same rows, as an export of the other does."""
    kinds: dict[Path, str] = {}
    for file in files:
        kind = max((end for end in ENDINGS if file.name.lower().endswith(end)), key=len)
        bare = file.with_name(file.name[: -len(kind)] or file.name)
        if (other := kinds.setdefault(bare, kind)) != kind:
            message = f"{bare.name}{other} and {file.name} differ in their kind alone, so their rows may be the same"
            raise DataError(str(file.parent), message, f"name one of them, or a pattern: {file.parent}/*{other}")
    return files


def _mark(file: Path) -> str | None:
    """The split that the name of a file or, if it marks none, of a folder it lies in marks.

    A shard, such as train_sft-00000-of-00002.parquet, is of the split that is its name.
    """
    stem = file.name.partition(".")[0]
    if (shard := SHARD.fullmatch(stem)) and shard["split"].lower() not in NO_SPLIT:
        return SPLITS.get(shard["split"].lower(), shard["split"])
    for part in (stem, *reversed(file.parts[:-1])):
        # Whole words only: "latest" and "contest" contain "test" and mark nothing.
        marks = [SPLITS[word] for word in re.split(r"[^a-z]+", part.lower()) if word in SPLITS]
        if marks:
            return marks[0]
    return None


def _saved(folder: Path) -> list[Path]:
    """The files of a data set that was saved with `save_to_disk`."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        # Not every .arrow file in the folder: `datasets` keeps its cache-….arrow files there, too.
        files = [folder / str(one["filename"]) for one in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(str(folder / "state.json"), f"cannot be read: {error}", "save the data set again") from error
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None or not files:
        raise DataError(str(missing or folder), "the data set has lost a file", "save the data set again")
    return files


def _saved_split(folder: Path, split: str) -> list[Path]:
    there = sorted(inner.name for inner in folder.iterdir() if (inner / "state.json").is_file())
    if split not in there:
        remedy = f"write split = one of {', '.join(there)}"
        raise DataError(str(folder), f"the saved data sets have no split {split!r}", remedy)
    return _saved(folder / split)
