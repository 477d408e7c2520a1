"""What single columns say of all rows of a data set, told once the rows have gone by."""

import json
from collections.abc import Iterator

from ftlaunch.recipe.data import Data
from ftlaunch.recipe.names import is_local
from ftlaunch.rows import looks
from ftlaunch.rows.files import SPLITS
from ftlaunch.rows.pairs import number_at
from ftlaunch.rows.template import DataError, Row, is_blank, optional_fields, template_fields

WEIGHTS = ("weight", "weights", "sample_weight")
UNHEARD = {
    **dict.fromkeys(WEIGHTS, "weighs rows, and all rows are trained alike"),
    **dict.fromkeys(
        ("image", "images", "audio", "audios", "video", "videos"),
        "holds what is no text, and a model is trained on text alone",
    ),
}
"""Fields without which rows say something else, in lower case → why."""
THOUGHTS = (
    "complex_cot",
    "cot",
    "chain_of_thought",
    "reasoning",
    "reasoning_content",
    "thinking",
    "thought",
    "thoughts",
)
TASKS = ("definition", "task_definition", "instruction")
"""Fields with what is asked of a question or an input."""
ANSWERS = ("answer", "answers", "response", "output", "completion", "target", "targets", "summary", "annotation")
IGNORE = 'unread = "ignore" to train without it'

SPLIT = "split"
"""The column in which a file of all splits names each row's own."""


class Columns:
    """What is noted of rows that go by, and what is wrong with all of them together."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self._preferences = set[str]()
        self._splits = dict[str, str]()
        self._known = set[str]()
        self._unheard = dict[str, tuple[str, str]]()
        self._weights = dict[str, float]()
        self._rows = 0

    def note(self, row: Row, where: str) -> None:
        """Note what the row has in columns that are judged; a few different values tell as much as all of them.

        Raises DataError where the row holds what nothing reads and without which it says something else.
        """
        if self._data.unread == "refuse":
            self._require_read(row, where)
        preference = None if self._data.preference_field is None else row.get(self._data.preference_field)
        if preference is not None and len(self._preferences) < 3:
            self._preferences.add(str(preference))
        named = row.get(SPLIT)
        if isinstance(named, str) and (split := SPLITS.get(named.lower())) is not None:
            self._splits[split] = named

    def _require_read(self, row: Row, where: str) -> None:
        for name in row.keys() - self._known:
            self._known.add(name)
            if (told := unheard(self._data, name)) is not None:
                self._unheard[name] = told
        for name, told in self._unheard.items():
            if name.lower() in WEIGHTS:
                weight = 1.0 if is_blank(row, (name,)) else number_at(row, (name,), where)
                # Rows before the first that has the field have no weight, as one that counts like any other.
                is_said = self._weights.setdefault(name, 1.0 if self._rows else weight) != weight
            else:
                is_said = not is_blank(row, (name,))
            if is_said:
                raise DataError(where, *told)
        self._rows += 1

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """(where, message, remedy) of columns by which rows would be trained otherwise than they are meant."""
        field = self._data.preference_field
        # Most such files mean by 0 that the other answer is better, and not that neither is.
        if self._preferences in ({"0", "1"}, {"0.0", "1.0"}):
            message = f"field {field} is 0 or 1 in all rows, and 0 would mean that no answer is better"
            remedy = (
                f"write -1 where `rejected` is the better one: jq -c 'if .{field} == 0 then .{field} = -1 else . end'"
            )
            yield self._data.path, message, f"{remedy} FILE > NEW; or leave out the rows with 0"
        if len(self._splits) > 1:
            yield self._data.path, *self._mixed()

    def _mixed(self) -> tuple[str, str]:
        name = self._splits.get("train", next(iter(self._splits.values())))
        others = " and ".join(repr(one) for one in sorted(self._splits.values()) if one != name)
        message = f"the column {SPLIT} says {name!r} of some rows and {others} of others, and all would be trained on"
        made = f"jq -c 'select(.{SPLIT} == \"{name}\")' FILE > NEW"
        if not is_local(self._data.path):
            of = f'load_dataset("{self._data.path}", split="{self._data.split}")'
            made = f'{of}.filter(lambda row: row["{SPLIT}"] == "{name}").to_json("NEW.jsonl")'
        return message, f"name a file of the rows that are meant: {made}; or, if all are, take the column out of it"


def misspelt(data: Data, fields: set[str]) -> Iterator[tuple[str, str, str]]:
    """(where, message, remedy) of optional fields that no row has: a missing required one is noticed by itself."""
    for template in (data.prompt, data.completion, data.chosen, data.rejected, data.system):
        for name in sorted(optional_fields(template or "") - fields):
            message = f"no row has the field {name}, which a template names as optional"
            yield data.path, message, f"the rows have the fields {', '.join(sorted(fields))}: use one of these"


def unheard(told: Data, name: str) -> tuple[str, str] | None:
    """What is lost with a field that nothing reads, and what to do about it; None where rows say the same without."""
    low = name.lower()
    if name in looks.fields_read(told, {name}):
        return None
    if low in UNHEARD:
        return f"the field {name} {UNHEARD[low]}", f"leave out such rows; or write {IGNORE}"
    if told.format == "text":
        written = _keys(f"{{{told.text_field}}}", f"{{{name}}}")
        return (f"the field {name} is not read, and may be the answer", written) if low in ANSWERS else None
    if name in looks.SYSTEMS and told.system is None:
        return f"the field {name} holds a system turn that is not read", f'write system = "{{{name}?}}", or {IGNORE}'
    return _unread_part(told, name) if told.format in ("prompt", "alpaca") else None


def _unread_part(told: Data, name: str) -> tuple[str, str] | None:
    """The same of a field with a part of the prompt or of the answer."""
    low, alpaca = name.lower(), told.format == "alpaca"
    asked = told.prompt or ("{instruction}{?\n\n{input}}" if alpaca else "{prompt}")
    answered = told.completion or ("{output}" if alpaca else "{completion}")
    if low in THOUGHTS:
        thought = f"{{?<think>\n{{{name}}}\n</think>\n\n}}{answered}"
        return f"the field {name} is not read, and may be the thought before the answer", _keys(asked, thought)
    if low == "history":
        made = f"instruction: .{template_fields(asked)[0][0]}, output: .{template_fields(answered)[0][0]}"
        remedy = f"write alpaca's rows, whose history is read: `jq -c '{{{made}, history, system}}' FILE > NEW`"
        return f"the field {name} holds earlier turns that are not read", f"{remedy}; or {IGNORE}"
    # Names of fields have told the templates of both: a prompt that is called so is taken to be whole.
    if told.prompt and told.completion and low in (*looks.EXTRAS, *TASKS):
        part = f"{{?{{{name}}}\n\n}}{asked}" if low in TASKS else f"{asked}{{?\n\n{{{name}}}}}"
        return f"the field {name} is not read, and may be part of the prompt", _keys(part, answered)
    return None


def _keys(prompt: str, completion: str) -> str:
    written = (f"{key} = {json.dumps(text)}" for key, text in (("prompt", prompt), ("completion", completion)))
    return f"write {', '.join(written)}; or {IGNORE}"
