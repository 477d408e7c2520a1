"""The format of rows, told by the names of their fields where a data table leaves it open."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, cast

from msgspec.structs import replace

from ftlaunch.recipe.data import Data
from ftlaunch.rows.conversations import LISTS, list_field, row_format
from ftlaunch.rows.messages import parsed, turns_in
from ftlaunch.rows.pairs import SPEAKER
from ftlaunch.rows.template import DataError, Row, template_fields

PREFERRED = (
    "write pairs: `jq -c '{prompt: .input.messages, chosen: .preferred_output, rejected: .non_preferred_output, "
    "tools: (.input.tools // [])}' FILE > NEW`"
)
GOOGLE = (
    'write turns: `jq -c \'{messages: [(.systemInstruction // .system_instruction // empty | .role = "system"),'
    ' .FIELD[] | {role, content: ([.parts[].text] | join(""))}]}\' FILE > NEW`'
)

LOOKED_AT = 1000
"""Rows by which a format is told: all fields that any of them has count."""

ANSWERED = (
    *(("question", "answer"), ("question", "response"), ("prompt", "response"), ("prompt", "answer")),
    *(("instruction", "response"), ("query", "response"), ("query", "answer"), ("problem", "solution")),
    *(("input", "output"), ("inputs", "targets"), ("user", "assistant")),
    *(("prompt", "completion"), ("instruction", "output")),  # with capitals: otherwise these tell formats of their own
)
"""Other names of the fields prompt and completion; the first that fit count."""

CHOICES = ("choices", "options")
"""Fields with what the answer of a question is one of."""
CHOICE = re.compile(r"(?:(?:option|choice|op)[_ ]?)?[a-d]|(?:option|choice)[_ ]?[1-4]")
"""One choice of several in a field of its own, in lower case."""
EXTRAS = ("context", "input", "passage")
"""Fields with what a prompt is about, for formats told by ANSWERED; rows may lack them."""


SYSTEMS = ("system", "system_prompt")
"""Fields with the text of a system turn."""

LABELS = ("label", "labels", "kto_tag", "desirable", "accepted", "correct", "is_correct")
"""Fields that may tell which answers are bad."""

TRUTHS = {
    *("true", "false", "0", "1", "0.0", "1.0", "-1", "-1.0", "yes", "no", "good", "bad"),
    *("chosen", "rejected", "desirable", "undesirable"),
}
"""Good and bad as data has them, in lower case."""

TO_TEMPLATES = {"tools", "functions", "documents", "chat_template_kwargs"}
"""Fields that chat templates are given. Another one that they ask for counts as unread here, as no template is read."""


def fields_read(data: Data, fields: Set[str]) -> set[str]:
    """Those of rows' fields that training reads, the format being told."""
    templates = (data.prompt, data.completion, data.chosen, data.rejected, data.system)
    read = {path[0] for template in templates if template for path in template_fields(template)}
    read |= {name for name in (data.margin_field, data.preference_field) if name is not None}
    match row_format(data):
        case "text":
            return {data.text_field}
        case "alpaca":
            return read | {"instruction", "input", "output", "history"}
        case "messages" | "sharegpt":
            return read | {list_field(data, dict.fromkeys(fields))} | TO_TEMPLATES
        case "ratings":
            of_answers = set[str]() if data.group_by is None else {data.answer_field, data.rating_field, data.group_by}
            return read | {data.answers_field, "prompt"} | of_answers
        case "unpaired":
            read |= {data.label_field}
        case "preference" if data.prompt is None and "prompt" not in fields:
            read |= {next((name for name in LISTS if name in fields), "prompt")}
        case _:
            pass
    sides = ("prompt", "completion", "chosen", "rejected")
    return read | TO_TEMPLATES | {side for side in sides if getattr(data, side) is None}


def is_open(data: Data) -> bool:
    """Whether neither a format nor templates tell what rows are."""
    told = (data.format, data.completion, data.chosen, data.rejected)
    return not any(told) and (data.prompt is None or data.format is None)


def looked_at(data: Data, rows: Iterable[tuple[str, Row]], *, only_prompts: bool = False) -> Data:
    """The data table with the format that its first rows tell; as it is where the table tells it.

    Where `only_prompts` are wanted, a template of the prompt is enough.

    Raises DataError where fields do not tell it, or tell of a tree of messages or of answers that may be bad.
    """
    if not is_open(data):
        return data
    if only_prompts and data.prompt is not None:
        return replace(data, format="prompt")
    fields: dict[str, Any] = {}
    labels: dict[str, list[object]] = {}
    first = [row for _, row in rows]
    if data.path.lower().endswith(".txt"):
        _refuse_other_texts(data, [str(row.get("text")) for row in first])
    for row in first:
        for name in LABELS:
            labels.setdefault(name, []).extend(value for value in [row.get(name)] if value is not None)
        # null never replaces a value, as the types of values are looked at below.
        fields |= {name: value for name, value in row.items() if value is not None or name not in fields}
    told = replace(data, **_suitable_format(data, fields))
    system = next((name for name in SYSTEMS if name in fields), None)
    if system is not None and told.system is None and told.format not in ("text", None):
        told = replace(told, system=f"{{{system}?}}")
    if not only_prompts and told.format in ("prompt", "alpaca", "messages", "sharegpt"):
        read = fields_read(told, fields.keys())
        _refuse_labels(told, {name: values for name, values in labels.items() if name not in read})
    # A reward function is given whole rows.
    return told if only_prompts else replace(told, unread=data.unread or "refuse")


def _refuse_labels(told: Data, labels: Mapping[str, list[object]]) -> None:
    """Raise DataError where a field that nothing reads may say which answers are bad."""
    for name, values in labels.items():
        found = {str(value).lower() for value in values}
        if found and found <= TRUTHS:
            message = f"the field {name} is only {' or '.join(sorted(found))}: it may say which answers are bad"
            remedy = f"leave out rows with bad answers; or, to train on all rows, write {_written(told)}"
            raise DataError(told.path, message, remedy)


def _written(told: Data) -> str:
    """The keys that say what the fields have told."""
    keys = {key: getattr(told, key) for key in ("format", "prompt", "completion", "system")}
    return ", ".join(f"{key} = {json.dumps(text)}" for key, text in keys.items() if text is not None)


def _suitable_format(data: Data, fields: Mapping[str, object]) -> dict[str, str]:
    """The keys of a data table that the fields tell."""
    names = fields.keys()
    if data.prompt is not None:
        return {"format": "preference" if {"chosen", "rejected"} <= names else "prompt"}
    # The most telling names come first: pairs have a prompt, too, and messages of a tree a text.
    if {"message_id", "parent_id"} <= names:
        remedy = "join each path from a root to a leaf to one row with a list of messages, and name that file"
        raise DataError(data.path, "the rows are single messages of a tree, each with its parent_id", remedy)
    if {"chosen", "rejected"} <= names:
        # Turns hold their prompt, and Human: at the start of a text opens one.
        is_bare = "prompt" not in names and isinstance(answer := fields["chosen"], str) and not SPEAKER.search(answer)
        asked = next((name for name in ("question", "instruction", "query", "input") if name in names), None)
        told = {"format": "preference"}
        return told | {"prompt": f"{{{asked}}}"} if is_bare and asked and data.template != "none" else told
    if {"prompt", "completion"} <= names:
        # A class number as label does not make an answer good or bad; true and false do. 0 and 1 may be either.
        return {"format": "unpaired" if isinstance(fields.get("label"), bool) else "prompt"}
    if (listed := _list_of_turns(data, fields)) is not None:
        return {"format": listed}
    if (told := _of_texts(data, names)) is not None:
        return told
    named = ", ".join(sorted(names)) or "there are none"
    raise DataError(data.path, f"the rows' fields do not tell their format: {named}", _remedy(fields))


def _refuse_other_texts(data: Data, lines: Sequence[str]) -> None:
    """Raise DataError where the lines of a .txt are objects of JSON, as Windows hides an ending after .jsonl, or cells.

    Excel calls a table between tabs "Unicode text", and has it end in .txt.
    """
    tabs = {line.count("\t") for line in lines[:2]}
    is_table = len(tabs) == 1 and tabs != {0}
    if is_table or isinstance(parsed(lines[0]), dict):
        kind, ending = ("cells between tabs", ".tsv") if is_table else ("JSON", ".jsonl")
        remedy = f'rename it so that it ends in {ending}; or, to train on {kind} as they stand, write format = "text"'
        raise DataError(data.path, f"its lines are {kind}, and a .txt is trained as it stands", remedy)


def _of_texts(data: Data, names: Set[str]) -> dict[str, str] | None:
    """The same for rows whose fields are texts; None where these do not tell it."""
    if {"instruction", "output"} <= names:
        return {"format": "alpaca"}
    # "Question" counts as "question", unless both are there.
    spelt = {name.lower(): name for name in sorted(names, key=str.islower)}
    for asked, answered in ANSWERED:
        if {asked, answered} <= spelt.keys():
            if choices := _choices(spelt):
                prompt = "\\n".join([f"{{{spelt[asked]}}}", *choices.values()])
                remedy = f'write them: prompt = "{prompt}", completion = "{{{spelt[answered]}}}"'
                where = f"field{'s' * (len(choices) > 1)} {', '.join(choices)}"
                message = f"the rows have choices, in the {where}, that no prompt names"
                raise DataError(data.path, message, remedy)
            # In ("input", "output") the input is the prompt itself and no extra.
            extra = next((spelt[name] for name in EXTRAS if name in spelt.keys() - {asked}), None)
            prompt = f"{{{spelt[asked]}}}" + (f"{{?\n\n{{{extra}}}}}" if extra else "")
            return {"format": "prompt", "prompt": prompt, "completion": f"{{{spelt[answered]}}}"}
    if "prompt" in names:
        return {"format": "prompt"}
    if "text" in names:
        return {"format": "text"}
    return None


def _choices(spelt: Mapping[str, str]) -> dict[str, str]:
    """Fields with what the answer of a question is one of → the lines of a prompt that name them."""
    if (listed := next((spelt[name] for name in CHOICES if name in spelt), None)) is not None:
        return {listed: f"0: {{{listed}[0]}}\\n1: {{{listed}[1]}}"}
    single = [spelt[name] for name in sorted(spelt) if CHOICE.fullmatch(name)]
    return {name: f"{name}: {{{name}}}" for name in single} if len(single) > 1 else {}


def _remedy(fields: Mapping[str, object]) -> str:
    """What makes rows whose fields tell no format readable."""
    if {"preferred_output", "non_preferred_output"} <= fields.keys():  # OpenAI's files of preferences
        return PREFERRED
    if any(str(value).startswith("[{'") for value in fields.values() if isinstance(value, str)):
        return "a field holds a list as Python writes it: write the file again with json.dumps of that list"
    if "input_ids" in fields:
        return "token ids are not read: name the texts that they were made of"
    ratings = ""
    lists = ((name, cast("list[object]", value)) for name, value in fields.items() if isinstance(value, list))
    for name, first in ((name, cast(Row, items[0])) for name, items in lists if items and isinstance(items[0], dict)):
        if "parts" in first:  # Google's turns
            return GOOGLE.replace("FIELD", name)
        if not {"role", "from"} & first.keys():
            keys = f'answers_field = "{name}", answer_field = "…", rating_field = "…"'
            ratings = f'; if {name} are answers with ratings, format = "ratings", prompt = "{{…}}", {keys}'
    remedy = 'write prompt = "{…}" and completion = "{…}" over these fields (for pairs prompt, chosen and rejected),'
    others = 'format = "text" and text_field = "…" for plain text, or a format, with messages_field = "…"'
    return f"{remedy} {others} where a field lists turns{ratings}"


def _list_of_turns(data: Data, fields: Mapping[str, object]) -> str | None:
    """The format of the field that lists turns, if there is one."""
    for name in (data.messages_field,) if data.messages_field else LISTS:
        turns = turns_in(fields.get(name))
        if isinstance(turns, list):
            first = cast("list[object]", turns)[:1]
            return "sharegpt" if first and isinstance(first[0], dict) and "from" in first[0] else "messages"
    return None
