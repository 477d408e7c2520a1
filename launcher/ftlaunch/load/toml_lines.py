"""Line numbers of the keys of a TOML text, which tomllib does not give.

The text has been accepted by tomllib before it comes here, so nothing is judged and nothing can be malformed.
"""

import re
from bisect import bisect_left

from ftlaunch.load.origins import KeyPath

SPACE = re.compile(r"[ \t]*")
FILLER = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
SIMPLE_KEY = re.compile(r"""(?P<bare>[A-Za-z0-9_-]+)|"(?P<basic>(?:[^"\\\n]|\\.)*)"|'(?P<literal>[^'\n]*)'""")
# Three quotes before one: """ would be an empty text and a quote.
STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}(?!")'  # the value may itself end in one or two quotes
    r"|'''.*?'{3,5}(?!')"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)
SCALAR = re.compile(r"[^,\]}#\n]*")
ESCAPE = re.compile(r'\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|([btnfr"\\]))')
ESCAPED = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", '"': '"', "\\": "\\"}


def key_lines(text: str) -> dict[KeyPath, int]:
    """Line of every key, table and list element that the text defines.

    A table's line is that of its header or, where it has none, of its first mention.
    """
    return _Scanner(text).scan()


def split_key(text: str) -> tuple[str, ...]:
    """The parts of a dotted key such as `data."my set".path`. Raises ValueError where it is not one."""
    scanner = _Scanner(text)
    keys = scanner.dotted_key()
    if scanner.position != len(text):
        raise ValueError(f"no key, only up to character {scanner.position}")
    return keys


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.lines: dict[KeyPath, int] = {}
        # Collected once: counting the line ends before each key would take quadratic time.
        self._newlines = [index for index, character in enumerate(text) if character == "\n"]
        # [[stage]] headers so far: a [stage.model] below belongs to the last of them.
        self._lengths: dict[KeyPath, int] = {}

    def scan(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        self._match(FILLER)
        while self.position < len(self.text):
            if self._take("[["):
                table = self._header(element=True)
            elif self._take("["):
                table = self._header(element=False)
            else:
                self._pair(table)
            self._match(FILLER)
        return self.lines

    def dotted_key(self) -> tuple[str, ...]:
        keys = [self._simple_key()]
        while self._take("."):
            keys.append(self._simple_key())
        return tuple(keys)

    def _header(self, *, element: bool) -> KeyPath:
        """The path of the table that a header opens, read up to the end of its closing brackets."""
        line = self._line()
        keys = self.dotted_key()
        self._take("]]" if element else "]")
        path: KeyPath = ()
        for key in keys[:-1]:
            path = self._last_of((*path, key), line)
        path = (*path, keys[-1])
        if not element:
            # Not setdefault: [a.b] may have mentioned `a` before the header [a] comes.
            self.lines[path] = line
            return path
        self._lengths[path] = self._lengths.get(path, 0) + 1
        return self._last_of(path, line)

    def _last_of(self, path: KeyPath, line: int) -> KeyPath:
        """The path itself, or of its last element where it is an array of tables."""
        self.lines.setdefault(path, line)
        if path in self._lengths:
            path = (*path, self._lengths[path] - 1)
            self.lines.setdefault(path, line)
        return path

    def _pair(self, table: KeyPath) -> None:
        line = self._line()
        path = table
        for key in self.dotted_key():
            path = (*path, key)
            self.lines.setdefault(path, line)
        self._take("=")
        self._value(path)

    def _value(self, path: KeyPath) -> None:
        if self._take("["):
            self._array(path)
        elif self._take("{"):
            self._inline_table(path)
        elif not self._match(STRING):
            self._match(SCALAR)

    def _array(self, path: KeyPath) -> None:
        index = 0
        self._match(FILLER)
        while not self._take("]"):
            self.lines[(*path, index)] = self._line()
            self._value((*path, index))
            index += 1
            self._match(FILLER)
            self._take(",")
            self._match(FILLER)

    def _inline_table(self, path: KeyPath) -> None:
        self._match(FILLER)
        while not self._take("}"):
            self._pair(path)
            self._match(FILLER)
            self._take(",")
            self._match(FILLER)

    def _simple_key(self) -> str:
        self._match(SPACE)
        match = SIMPLE_KEY.match(self.text, self.position)
        if match is None:
            raise ValueError(f"no key at character {self.position}")
        self.position = match.end()
        self._match(SPACE)
        if match["basic"] is not None:
            return ESCAPE.sub(_unescape, match["basic"])
        return match["bare"] or match["literal"] or ""

    def _take(self, token: str) -> bool:
        """Step over the token and the blanks after it, if it comes next."""
        if not self.text.startswith(token, self.position):
            return False
        self.position += len(token)
        self._match(SPACE)
        return True

    def _match(self, pattern: re.Pattern[str]) -> bool:
        """Step over what the pattern matches here, if it does."""
        match = pattern.match(self.text, self.position)
        if match is None:
            return False
        self.position = match.end()
        return True

    def _line(self) -> int:
        return bisect_left(self._newlines, self.position) + 1


def _unescape(match: re.Match[str]) -> str:
    code = match[1] or match[2]
    return chr(int(code, 16)) if code else ESCAPED[match[3]]
