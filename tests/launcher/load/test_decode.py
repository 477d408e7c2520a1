"""Decoding knows structs and no recipe: it is tried here on a vocabulary of its own."""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta, Struct, field

from ftlaunch.load.decode import find_problems
from ftlaunch.load.origins import Source, SourceMap

WHERE = SourceMap(Source("top", Path()), {})


class Oil(Struct, forbid_unknown_fields=True, tag_field="kind", tag="oil"):
    grade: Annotated[int, Meta(ge=5, le=60)]


class Wind(Struct, forbid_unknown_fields=True, tag_field="kind", tag="wind"):
    blades: Annotated[int, Meta(ge=2)] = 3
    height: float = 80


class Wheel(Struct, forbid_unknown_fields=True):
    radius: Annotated[float, Meta(gt=0)]
    spokes: list[Annotated[str, Meta(min_length=1)]] = field(default_factory=list)


class Mill(Struct, forbid_unknown_fields=True):
    owner: str
    drive: Oil | Wind = field(default_factory=Wind)
    wheels: Annotated[list[Wheel], Meta(min_length=1)] = field(default_factory=list)
    rooms: dict[Annotated[str, Meta(pattern="^[a-z]+$")], Wheel] = field(default_factory=dict)
    grain: Literal["rye", "wheat"] | None = None
    pair: tuple[int, bool] = (1, True)
    prompt: str = ""


def found(**values: Any) -> list[tuple[str, str, str]]:
    problems = find_problems(Mill, {"owner": "Ann", **values}, WHERE)
    return [(problem.key, problem.message, problem.remedy) for problem in problems]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"drive": {"kind": "oil", "grade": 5}, "wheels": [{"radius": 1}], "rooms": {"top": {"radius": 0.5}}},
        {"drive": {"kind": "wind"}, "grain": "rye", "pair": [0, False], "prompt": "two\nlines\tand a tab"},
        {"wheels": [{"radius": 2, "spokes": ["a"]}]},
    ],
)
def test_what_is_right_is_accepted_by_msgspec_too(values: dict[str, Any]) -> None:
    assert found(**values) == []
    msgspec.convert({"owner": "Ann", **values}, Mill)


def test_every_problem_is_found_and_in_the_file_s_order() -> None:
    keys = [
        key
        for key, _, _ in found(
            drive={"kind": "oil", "grade": 61, "blades": 2},
            wheels=[{"radius": 0}, {"spokes": [""]}],
            rooms={"top": 3, "A": {"radius": 1}},
            grain="oats",
            pair=[1, 1],
        )
    ]
    assert keys == [
        *("drive.grade", "drive.blades", "wheels[0].radius", "wheels[1].spokes", "wheels[1].radius"),
        *("rooms.top", "rooms.A", "grain", "pair"),
    ]


def test_a_misspelt_kind_is_judged_as_what_was_meant() -> None:
    assert [key for key, _, _ in found(drive={"kind": "wint", "blades": 1})] == ["drive.kind", "drive.blades"]


def test_a_missing_kind_is_told_from_the_keys() -> None:
    [(key, _, remedy), (second, _, _)] = found(drive={"blades": 1})
    assert (key, remedy, second) == ("drive.kind", 'write kind = "wind"', "drive.blades")


def test_an_unknown_kind_that_is_like_none_is_all_that_is_said() -> None:
    assert found(drive={"kind": 4, "zzz": 1}) == [
        ("drive.kind", 'expected "oil" or "wind", got 4', 'write kind = "oil" or "wind"')
    ]


def test_a_key_of_another_table_is_shown_its_place() -> None:
    [(_, message, remedy)] = found(radius=3)
    assert "it belongs to [[wheels]]" in message
    assert remedy == "move it to [[wheels]]"


def test_a_key_of_another_kind_names_that_kind() -> None:
    [(key, message, remedy)] = found(drive={"kind": "oil", "grade": 5, "height": 3})
    assert (key, remedy) == ("drive.height", 'remove it, or write kind = "wind"')
    assert message == 'belongs to kind "wind", and this table\'s kind is "oil"'


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        ({"owner": 3}, 'write owner = "3"'),
        ({"owner": ["Bob"]}, 'write owner = "Bob"'),
        ({"pair": ["1", True]}, "give it such a value, or leave it out for the default, [1, true]"),
        ({"wheels": [{"radius": "2.5"}]}, "write radius = 2.5"),
        ({"wheels": [{"radius": 1, "spokes": "a"}]}, 'write spokes = ["a"]'),
        ({"drive": {"kind": "wind", "blades": 4.0}}, "write blades = 4"),
    ],
)
def test_a_value_that_was_meant_otherwise_is_written_out(value: dict[str, Any], remedy: str) -> None:
    assert [problem[2] for problem in found(**value)] == [remedy]


@pytest.mark.parametrize("text", ["\x1b[2J", "a\nb", "a\tb", "\x00", "\x7f"])
def test_control_characters_are_refused_and_not_repeated(text: str) -> None:
    [(key, message, _)] = found(owner=text)
    assert key == "owner"
    assert text not in message


@pytest.mark.parametrize("text", ["\x1b", "a\rb", "\x7f"])
def test_templates_may_have_lines_and_tabs_and_no_other_control_character(text: str) -> None:
    assert [key for key, _, _ in found(prompt=text)] == ["prompt"]


def test_long_values_are_cut() -> None:
    [(_, message, _)] = found(grain="x" * 1000)
    assert len(message) < 120


def test_keys_with_control_characters_are_escaped() -> None:
    [(key, _, _)] = found(**{"\x1b": 1})
    assert key == '"\\u001b"'
