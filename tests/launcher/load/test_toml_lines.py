"""Line numbers of TOML keys, held against what tomllib reads from the same text."""

import random
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest

from ftlaunch.load.origins import KeyPath
from ftlaunch.load.toml_lines import key_lines, split_key

TEXTS = {
    "plain": 'a = 1 # [no]\nb.c.d = "x # no"\n\n[t]\n# k = 1\nk = true\n[t.u . "v w"]\nk = 1.5e3\n',
    "quotes": '"a b" = 1\n\'c.d\' = 2\n"e\\u0041\\"".f = \'x"\'\n"" = "\\"]"\n["g # h".\'i\']\nk = \'\'\n',
    "multi-line text": 'a = """\n[not]\nk = 1 \\\n"" \\""" \n"""\nb = \'\'\'\n[no]\n\'\'\'\'\'\nc = """x"""""\nd=1\n',
    "arrays": "a = [ # [\n  1, \"]\", [2,\n 3], # ]\n  {x = '}', y.z = [{}]},\n]\nb = []\nc = [1,2,]\nd = 1\n",
    "arrays of tables": "[[s]]\na=1\n[s.t]\nb=1\n[[s.u]]\nc=1\n[[s.u]]\nc=2\n[[s]]\na = {b = {}, c = [1]}\n[x]\ny=1\n",
    "header after its child": "[a.b]\nc = 1\n[a]\nd = 1\n",
    "dates and numbers": "a = 1979-05-27 07:32:00\nb = 07:32:00\nc = +1_000\nd = -inf\ne = 0x1F\n",
    "windows": 'a = 1\r\n[t]\r\nb = """\r\nx\r\n"""\r\nc = [\r\n1,\r\n]\r\n',
    "no newline at the end": "[t]\na = 1",
    "empty": "",
}


def paths(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    if path:
        yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from paths(child, (*path, key))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_every_key_that_tomllib_reads_has_a_line_and_no_other(text: str) -> None:
    assert set(key_lines(text)) == set(paths(tomllib.loads(text)))


def test_lines_are_those_of_the_keys() -> None:
    lines = key_lines('a = """\n\n"""\nb.c = [\n  1,\n  {d = 2},\n]\n[[s]]\n[[s]]\ne = 1\n[x.y]\n[x]\n')
    assert lines == {
        ("a",): 1,
        ("b",): 4,
        ("b", "c"): 4,
        ("b", "c", 0): 5,
        ("b", "c", 1): 6,
        ("b", "c", 1, "d"): 6,
        ("s",): 8,
        ("s", 0): 8,
        ("s", 1): 9,
        ("s", 1, "e"): 10,
        ("x", "y"): 11,
        ("x",): 12,
    }


SCALARS = [
    "1",
    "'#'",
    '"\\"]}"',
    '"""\n[x]\n"""',
    "'''\n'''",
    "true",
    "1.5",
    "[]",
    "{}",
    "[\n1, # ]\n[2]\n]",
    "{q = [3]}",
]


@pytest.mark.parametrize("seed", range(30))
def test_each_key_stands_in_the_line_that_is_told(seed: int) -> None:
    """Random documents whose keys are unique words: the line told for a key holds that very word."""
    rng = random.Random(seed)
    words = iter(f"k{number}" for number in range(1000))
    parts: list[str] = []
    for _ in range(12):
        header = rng.choice(["[{}]", "[[{}]]", "[{}.sub]", "# [{}]\n", '["{}"]']).format(next(words))
        pairs = [f"{next(words)}{rng.choice(['', '.dot'])} = {rng.choice(SCALARS)}" for _ in range(rng.randrange(4))]
        parts += [header, *pairs, rng.choice(["", "\n# note\n"])]
    text = "\n".join(parts)
    lines = key_lines(text)
    assert set(lines) == set(paths(tomllib.loads(text)))
    for path, line in lines.items():
        if isinstance(path[-1], str) and path[-1].startswith("k"):
            assert path[-1] in text.split("\n")[line - 1]


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("a", ("a",)),
        ("stage.0.learning_rate", ("stage", "0", "learning_rate")),
        ('data."my set".path', ("data", "my set", "path")),
        ("data.'a.b' . c", ("data", "a.b", "c")),
    ],
)
def test_dotted_keys_are_split(text: str, keys: tuple[str, ...]) -> None:
    assert split_key(text) == keys


@pytest.mark.parametrize("text", ["", ".", "a.", ".a", "a b", 'a."b', "a=b", "ä"])
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no key"):
        split_key(text)
