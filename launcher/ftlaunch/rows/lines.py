"""The text of a file: unpacked, decoded, line by line or in larger pieces."""

import bz2
import codecs
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, cast

from ftlaunch.recipe.names import PACKED
from ftlaunch.rows.tables import zst_stream
from ftlaunch.rows.template import DataError

LONGEST_LINE: Final = 8 * 2**20
"""Bytes. A longer line is a file of another kind, or one whose line ends were lost."""
PIECE: Final = 2**20
"""Bytes of a larger piece."""
POINTER = b"version https://git-lfs.github.com/spec/"
# Four bytes at most, as many as `Lines._open` reads.
MAGIC = {
    b"\x1f\x8b": ("is packed with gzip, which its name does not tell", "rename it so that it ends in .gz"),
    b"BZh": ("is packed with bzip2, which its name does not tell", "rename it so that it ends in .bz2"),
    b"\xfd7zX": ("is packed with xz, which its name does not tell", "rename it so that it ends in .xz"),
    b"\x28\xb5\x2f\xfd": (
        "is packed with Zstandard, which its name does not tell",
        "rename it so that it ends in .zst",
    ),
    b"PAR1": ("is a Parquet file, which its name does not tell", "rename it so that it ends in .parquet"),
    b"SQLi": ("is a database of SQLite", "export it: `sqlite3 -json FILE 'SELECT * FROM TABLE' > NEW.json`"),
    b"\xff\xfe\x00\x00": ("is UTF-32", "convert it: `iconv -f utf-32 -t utf-8 FILE > NEW`"),
    b"PK\x03\x04": ("is a zip archive, as sheets of Excel are", "unpack it, or save the sheet as “CSV UTF-8”"),
}
"""How packed files begin, with what is wrong with one of another name and its remedy."""
TWICE = "ÿþ".encode()
"""How a UTF-16 file begins that was converted to UTF-8 as if it were Latin-1."""

_BROKEN = (OSError, EOFError, lzma.LZMAError, zlib.error)
"""What reading a file raises that is cut short or damaged; gzip lets zlib's own error through."""
_ENCODING = (
    "write the file again as UTF-8: Excel does as “CSV UTF-8”, and for files from Windows"
    " `iconv -f cp1252 -t utf-8 FILE > NEW`; with -f latin1 its dashes, quotes and € would be lost"
)


def refuse_pointer(path: Path) -> None:
    """Raise DataError where a file only points to the data, or cannot be read."""
    try:
        with path.open("rb") as file:
            begins = file.read(len(POINTER))
    except OSError as error:
        raise DataError(str(path), f"cannot be read: {error.strerror}", "check the path") from error
    if begins == POINTER:
        remedy = "fetch the data with `git lfs pull` in the folder that was cloned"
        raise DataError(str(path), "is a Git LFS pointer, not the data itself", remedy)


class Lines:
    """The decoded lines of a file, line ends kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0
        self.position = 0
        """Bytes read so far, unpacked."""
        self.encoding = "utf-8"

    def at(self, line: int) -> str:
        return f"{self.path}:{line}"

    def __iter__(self) -> Iterator[str]:
        try:
            with self._open() as file:
                if self.encoding != "utf-8":
                    yield from self._lines_of_units(file)
                    return
                # A byte more than is allowed shows that a line is too long, without reading all of it.
                while raw := file.readline(LONGEST_LINE + 1):
                    self.number += 1
                    self.position += len(raw)
                    yield self._decoded(raw)
        except _BROKEN as error:
            raise self._unreadable(error) from error

    def pieces(self) -> Iterator[str]:
        """The text in pieces of about a megabyte, cut anywhere."""
        try:
            with self._open() as file:
                # A piece may end within a character: the decoder keeps those bytes for the next one.
                decoder = codecs.getincrementaldecoder("utf-8-sig" if self.encoding == "utf-8" else self.encoding)()
                while raw := file.read(PIECE):
                    self.position += len(raw)
                    text = self._piece(decoder, raw, final=False)
                    self.number += text.count("\n")
                    yield text
                # Raises where the file ends within a character.
                yield self._piece(decoder, b"", final=True)
        except _BROKEN as error:
            raise self._unreadable(error) from error

    def _piece(self, decoder: codecs.IncrementalDecoder, raw: bytes, *, final: bool) -> str:
        try:
            return decoder.decode(raw, final)
        except UnicodeDecodeError as error:
            line = self.number + 1 + error.object.count(b"\n", 0, error.start)
            raise _not_text(self.at(line), error) from error

    def _open(self) -> IO[bytes]:
        """The file from its start, unpacked, with `encoding` told by its first bytes."""
        # Before anything is unpacked: a pointer called facts.jsonl.gz is three lines of text.
        refuse_pointer(self.path)
        self.number = self.position = 0
        with _unpacked(self.path) as file:
            begins = file.read(4)
        if (packed := next((magic for magic in MAGIC if begins.startswith(magic)), None)) is not None:
            problem, remedy = MAGIC[packed]
            if self.path.suffix.lower() in PACKED:
                problem, remedy = "is packed twice, or holds an archive", "unpack it, and name what that makes"
            raise DataError(str(self.path), problem, remedy)
        if begins[1:2] == b"\0" or begins[:1] == b"\0":
            order = "le" if begins[1:2] == b"\0" else "be"
            remedy = f"convert it: `iconv -f utf-16{order} -t utf-8 FILE > NEW`"
            raise DataError(str(self.path), "begins with a NUL, as UTF-16 without a byte order mark does", remedy)
        if begins.startswith(TWICE):
            remedy = "convert it from its source as what it is: `iconv -f utf-16 -t utf-8 FILE > NEW`"
            raise DataError(self.at(1), "UTF-16 that was converted as if it were Latin-1", remedy)
        self.encoding = "utf-16" if begins[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8"
        return _unpacked(self.path)

    def _lines_of_units(self, file: IO[bytes]) -> Iterator[str]:
        """Lines of a file in UTF-16."""
        # A line end has two bytes here: reading bytes up to "\n" would cut it in half.
        reader = codecs.getreader(self.encoding)(file)
        try:
            while text := reader.readline():
                self.number += 1
                self.position = file.tell()
                yield text
        except UnicodeDecodeError as error:
            raise _not_text(self.at(self.number + 1), error) from error

    def _decoded(self, raw: bytes) -> str:
        if len(raw) > LONGEST_LINE:
            problem = f"the line is longer than {LONGEST_LINE // 2**20} MiB"
            raise DataError(self.at(self.number), problem, "put each row on a line of its own, or cut the row down")
        try:
            # Excel puts a byte order mark first, which would become part of the first column's name.
            return raw.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _not_text(self.at(self.number), error) from error

    def _unreadable(self, error: Exception) -> DataError:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        remedy = "check the path; it may have been cut short"
        if said.startswith("Not a gzipped file"):
            remedy = f"it is not packed: rename it to {self.path.stem}"
        return DataError(str(self.path), f"cannot be read: {said}", remedy)


def _not_text(where: str, error: UnicodeDecodeError) -> DataError:
    return DataError(where, f"not UTF-8 (byte 0x{error.object[error.start]:02x})", _ENCODING)


def _unpacked(path: Path) -> IO[bytes]:
    match path.suffix.lower():
        case ".gz":
            import gzip  # the other packers' modules are imported in any case, by shutil

            return cast(IO[bytes], gzip.open(path, "rb"))
        case ".bz2":
            return bz2.open(path, "rb")
        case ".xz":
            return lzma.open(path, "rb")
        case ".zst":
            return zst_stream(path)
        case _:
            return path.open("rb")
