"""Where rows come from: local files or a data set of the hub."""

import hashlib
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs

from ftlaunch.errors import UserError
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.names import is_local
from ftlaunch.recipe.stages import Pairwise, Ppo
from ftlaunch.rows import looks, tables
from ftlaunch.rows.columns import misspelt
from ftlaunch.rows.conversations import is_paired
from ftlaunch.rows.files import data_files
from ftlaunch.rows.groups import grouped
from ftlaunch.rows.readers import read_rows
from ftlaunch.rows.template import Row
from ftlaunch.run import digests
from ftlaunch.run.spec import StageSpec

Rows = Iterator[tuple[str, Row]]
"""(place of the row, such as "facts.jsonl:17"; the row)."""

ON_HUB = "hf://datasets/"
"""Stands before an id, so that `datasets` does not take a folder of that name in the working directory for it."""
COMMIT = re.compile(r"[0-9a-f]{40}")

SHUFFLED_ROWS = 1000
"""Rows that a stream holds in memory to draw the next one from."""


def settled(data: Data, *, only_prompts: bool = False) -> Data:
    """Return the data table with the format of its first rows, if it leaves the format open. Raises UserError."""
    if looks.is_open(data):
        data = looks.looked_at(data, islice(load_rows(data), looks.LOOKED_AT), only_prompts=only_prompts)
    # Files here have been looked over by the launcher. All rows of the hub's data set have its columns.
    if not is_local(data.path):
        for _, row in islice(load_rows(data), 1):
            require_none(misspelt(data, set(row)))
    return data


def require_none(problems: Iterable[tuple[str, str, str]]) -> None:
    """Raise UserError of the first of these (where, message, remedy)."""
    for where, message, remedy in problems:
        raise UserError(f"{where}: {message}", remedy)


def with_formats(spec: StageSpec) -> StageSpec:
    """Return the spec with the formats of its data filled in. Raises UserError where the stage cannot train on one."""
    only_prompts = isinstance(spec.stage, Ppo)
    data = {name: settled(table, only_prompts=only_prompts) for name, table in spec.data.items()}
    for name, table in data.items():
        fits = is_paired(table) == isinstance(spec.stage, Pairwise) and table.format != "unpaired"
        if looks.is_open(spec.data[name]) and not fits and not only_prompts:
            kind = spec.stage.__struct_config__.tag
            message = f"a stage of kind {kind} cannot train on [data.{name}], whose rows are of format {table.format}"
            raise UserError(message, "name another data set, or write the format and its keys in the data table")
    return structs.replace(spec, data=data)


def load_rows(data: Data) -> Rows:
    """The rows of a data set in its own order, at most `data.limit`.

    Raises UserError where a file or row is broken, or the hub does not have, or does not give, what is named.
    """
    rows = _local_rows(data) if is_local(data.path) else _hub_rows(_open_hub(data), data, "row")
    return islice(grouped(data, rows), data.limit)


def stream_rows(data: Data, seed: int, skip: int) -> Rows:
    """Yield the rows after the first `skip` in a seeded order, shuffled within a window of 1000 rows."""
    # Skipped before shuffling: the first rows are the test, and must be the same ones for every seed.
    if is_local(data.path):
        return _shuffled(islice(load_rows(data), skip, None), seed)
    found = _open_hub(data)
    limited = found if data.limit is None else found.take(data.limit)
    return _hub_rows(limited.skip(skip).shuffle(seed=seed, buffer_size=SHUFFLED_ROWS), data, "shuffled row")


def fingerprint(data: Data) -> str:
    """A digest that changes with the rows: SHA-256 of the files' contents, or the commit of a hub data set."""
    if not is_local(data.path):
        return f"{data.path}@{commit_of(data)} {data.config} {data.split}"
    digest = hashlib.sha256()
    for path in data_files(Path(data.path), data.split):
        # The suffix decides how a file is read, so it is part of what the rows depend on.
        digest.update("".join(path.suffixes).encode() + bytes.fromhex(digests.sha256(path)))
    return digest.hexdigest()


def _local_rows(data: Data) -> Rows:
    for path in data_files(Path(data.path), data.split):
        yield from read_rows(path)


def _hub_rows(rows: Any, data: Data, word: str) -> Rows:
    for number, row in enumerate(rows):
        whole = {name: tables.without_null(value) for name, value in row.items()}
        yield f"{data.path}[{data.split}] ({word} {number})", whole


def commit_of(data: Data) -> str:
    """The commit that a hub data set's table names; of what is cached here, where the hub is not reached."""
    return str(_builder(data.path, data.config, data.revision).hash)


def _open_hub(data: Data) -> Any:
    """A `datasets.Dataset`, or an IterableDataset for streaming."""
    return _open(data.path, data.config, data.split, data.revision, data.streaming)


@lru_cache(maxsize=8)
def _open(path: str, config: str | None, split: str, revision: str | None, streaming: bool) -> Any:
    builder = _builder(path, config, revision)
    with _as_user_error(path):
        if streaming:
            return builder.as_streaming_dataset(split=split)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)


@lru_cache(maxsize=8)
def _builder(path: str, config: str | None, revision: str | None) -> Any:
    from datasets import load_dataset_builder

    with _as_user_error(path):
        found = load_dataset_builder(ON_HUB + path, config, revision=revision)
    # Without a network `datasets` takes the newest copy in its cache, whatever revision it is asked for.
    if COMMIT.fullmatch(revision or "") and found.hash != revision:
        return _cached(path, config, str(revision), Path(found.cache_dir).parents[2])
    return found


def _cached(path: str, config: str | None, commit: str, folder: Path) -> Any:
    """The copy of a commit in the folder where `datasets` keeps all copies of a data set. UserError without one."""
    from datasets.packaged_modules.cache.cache import Cache

    copies = sorted(folder.glob(f"{config or '*'}/*/{commit}"))
    if len(copies) != 1:
        message = f"the data set {path!r} cannot be had at commit {commit}: the hub is not reached"
        raise UserError(message, "load it once where there is a network")
    *_, name, version, _ = copies[0].parts
    kept_as = copies[0].parent.parent.parent.name.rpartition("___")[2]
    return Cache(dataset_name=kept_as, config_name=name, version=version, hash=commit, repo_id=path)


@contextmanager
def _as_user_error(path: str) -> Generator[None]:
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        yield
    except DatasetNotFoundError as error:
        remedy = "check the id and the revision; a private data set needs `hf auth login`; a local file needs its path"
        raise UserError(f"the hub has no data set {path!r} that you may read: {_first_line(error)}", remedy) from error
    except ConnectionError as error:
        remedy = "check the network, or load it once where there is one, or name a local file"
        raise UserError(f"the data set {path!r} cannot be had: {_first_line(error)}", remedy) from error
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        remedy = "check `config`, `split` and `revision` of the data table"
        if "scripts are no longer supported" in str(error):
            remedy = 'its script is never run; try revision = "refs/convert/parquet", or download its files'
        raise UserError(f"the data set {path!r} cannot be loaded: {_first_line(error)}", remedy) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _shuffled(rows: Rows, seed: int) -> Rows:
    """Rows drawn at random from a window that the next ones fill up: the hub's streams are shuffled the same way."""
    generator = np.random.Generator(np.random.PCG64(seed))
    window: list[tuple[str, Row]] = []
    for row in rows:
        if len(window) < SHUFFLED_ROWS:
            window.append(row)
        else:
            place = int(generator.integers(SHUFFLED_ROWS))
            yield window[place]
            window[place] = row
    yield from (window[place] for place in generator.permutation(len(window)))
