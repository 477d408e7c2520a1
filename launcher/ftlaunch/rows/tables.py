# pyright: basic
"""Rows of .parquet and .arrow files, read with pyarrow, which comes with the trainer's packages."""

import io
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, cast

from ftlaunch.rows.template import DataError, Row

BATCH = 1024
"""Rows turned into Python values together."""


def can_be_read() -> bool:
    """Whether pyarrow is installed; a login node may be without it."""
    return find_spec("pyarrow") is not None


def table_rows(path: Path, kind: str) -> Iterator[tuple[str, Row]]:
    """Each row of a .parquet or .arrow file with its place. Raises DataError where it cannot be read.

    Fields that only other rows have, which such files hold as null inside of lists and objects, are taken out again.
    """
    import pyarrow

    number = 0
    try:
        for batch in _parquet_batches(path) if kind == ".parquet" else _arrow_batches(path):
            if len(set(batch.schema.names)) < batch.num_columns:
                twice = next(name for name in batch.schema.names if batch.schema.names.count(name) > 1)
                raise DataError(str(path), f"column {twice!r} is there twice", "give each column a name of its own")
            # A null column is kept: it is a field of the row, which a template may call optional.
            nested = {field.name for field in batch.schema if pyarrow.types.is_nested(field.type)}
            for row in _with_short_floats(batch).to_pylist(maps_as_pydicts="lossy"):
                number += 1
                yield (
                    f"{path} (row {number})",
                    {name: without_null(value) if name in nested else value for name, value in row.items()},
                )
    except (OverflowError, UnicodeDecodeError) as error:
        problem = f"a value is none that can be read: {error}"
        remedy = "mend it: dates lie in the years 1 to 9999, and text is UTF-8"
        raise DataError(f"{path} (in {BATCH} rows after row {number})", problem, remedy) from error
    except (pyarrow.ArrowException, OSError) as error:
        remedy = "write the file again; it may have been cut short"
        raise DataError(str(path), f"cannot be read as {kind[1:]}: {error}", remedy) from error
    if number == 0:
        raise DataError(str(path), "the file has no rows", "check that it was written to the end")


def _parquet_batches(path: Path) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=BATCH)


def _arrow_batches(path: Path) -> Iterator[Any]:
    """The batches of an Arrow file, written as a stream, as `datasets` does, or for random access."""
    import pyarrow
    from pyarrow import ipc

    with pyarrow.memory_map(str(path)) as source:
        # The format for random access begins with ARROW1, a stream does not.
        is_stream = source.read(6) != b"ARROW1"
        source.seek(0)
        if is_stream:
            yield from _small(ipc.open_stream(source))
        else:
            file = ipc.open_file(source)
            yield from _small(file.get_batch(index) for index in range(file.num_record_batches))


def _small(batches: Any) -> Iterator[Any]:
    for batch in batches:
        # A file may hold millions of rows in one batch, and to_pylist turns a whole batch into Python values.
        for start in range(0, batch.num_rows, BATCH):
            yield batch.slice(start, BATCH)


def _with_short_floats(batch: Any) -> Any:
    """The batch with columns of 32-bit floats as text reads them: 0.1, not the 0.10000000149011612 that is nearest."""
    import pyarrow
    from pyarrow import compute

    for index, field in enumerate(batch.schema):
        if pyarrow.types.is_float32(field.type):
            # As text Arrow writes the shortest number that is read back as the same 32 bits.
            column: Any = compute.cast(compute.cast(batch.column(index), pyarrow.string()), pyarrow.float64())
            batch = batch.set_column(index, field.name, column)
    return batch


def without_null(value: object) -> object:
    """The same without the fields inside of lists and objects that are null, as only other rows have them."""
    if isinstance(value, dict):
        return {key: without_null(one) for key, one in cast(Row, value).items() if one is not None}
    if isinstance(value, list):
        return [without_null(one) for one in cast("list[object]", value)]
    return value


def zst_stream(path: Path) -> IO[bytes]:
    """The unpacked bytes of a .zst file: Python itself has no reader for Zstandard. Raises DataError."""
    try:
        import pyarrow
    except ImportError as error:
        remedy = "install ftlaunch[train], or unpack it: `unzstd FILE`"
        raise DataError(str(path), "a .zst file is read with pyarrow, which is not installed", remedy) from error
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
