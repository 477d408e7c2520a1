"""Reading a file that is still being written: the lines that were added since the last look."""

import os
from pathlib import Path

CHUNK = 1 << 20


class Tail:
    """Whole lines of a growing file. It need not exist yet, and may be cut short or replaced: then it starts again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # No file has inode 0, so the first look always starts at the beginning.
        self._inode: int = 0
        self._offset = 0
        self._rest = b""

    def read(self) -> list[str]:
        """Lines, without their ends, that are complete since the last call: at most about 1 MB of them."""
        data = self._more()
        pieces = (self._rest + data).split(b"\n")
        # What follows the last line end is a line that is still being written.
        self._rest = pieces.pop()
        return [piece.decode(errors="replace") for piece in pieces]

    def last(self) -> list[str]:
        """What follows the last line end, for when nobody will write on."""
        rest, self._rest = self._rest, b""
        return [rest.decode(errors="replace")] if rest else []

    def _more(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                self._notice_replacement(file.fileno())
                file.seek(self._offset)
                data = file.read(CHUNK)
        except FileNotFoundError:
            return b""
        self._offset += len(data)
        return data

    def _notice_replacement(self, descriptor: int) -> None:
        # Of the open file: the path may lead to another one a moment later.
        stat = os.fstat(descriptor)
        if stat.st_ino != self._inode or stat.st_size < self._offset:
            self._inode = stat.st_ino
            self._offset, self._rest = 0, b""
