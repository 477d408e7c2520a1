"""Conversations as data sets list them, turn by turn, brought to one form."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from ftlaunch.rows.template import Row, Unfit, is_blank, kind_of, shown, text_at, value_at

Turn = dict[str, Any]
"""A turn has at least "role" and "content", a text; all else in a row's message is handed on to the chat template."""

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "chatbot", "model", "bot", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
"""What data sets call a speaker → the role that chat templates know; a "call" is an assistant turn that is all call."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a turn that hold what was thought before it was said."""
WEIGHTS = ("weight", "train", "training", "trainable", "learnable", "loss")
"""Keys of a turn that tell whether it is trained: 0 or 1, true or false."""
MASKS = ("train_detail", "mask", "loss_mask")
"""Keys of a turn by which other trainers mark what of it is trained, and that are not read here."""
LEAVE_OUT = "leave such rows out of the file, or mend them"


@dataclass(frozen=True)
class Conversation:
    """Turns, and what else a chat template is given."""

    turns: list[Turn]
    fields: Row = field(default_factory=dict[str, Any])
    """Fields of the row, by name: those that the chat template asks for reach it."""
    untrained: frozenset[int] = frozenset()
    """Assistant turns that the row itself marks as not to be trained."""

    def followed_by(self, other: "Conversation") -> "Conversation":
        """Both, one after the other."""
        later = frozenset(index + len(self.turns) for index in other.untrained)
        return Conversation([*self.turns, *other.turns], {**other.fields, **self.fields}, self.untrained | later)

    def up_to(self, end: int) -> "Conversation":
        """The first `end` turns."""
        return Conversation(self.turns[:end], self.fields, self.untrained)


def message_turns(row: Row, name: str, where: str, *, may_be_blank: bool = False) -> Conversation:
    """The conversation in a field that lists its turns, as {"role": …, "content": …} or {"from": …, "value": …}.

    An empty system turn is none. The last turn may be blank if so told. Raises Unfit.
    """
    entries = entries_of(row, name, where)
    # The turns may have been a JSON text: paths into the row lead to the parsed list from here on.
    row = {**row, name: entries}
    turns: list[Turn] = []
    untrained: set[int] = set()
    for index, entry in enumerate(entries):
        last = may_be_blank and index == len(entries) - 1
        turn = _turn(row, (name, str(index)), entry, where, may_be_blank=last)
        if turn["role"] == "system" and not turn["content"]:
            continue
        if turn["role"] == "assistant" and not _is_trained(entry, (name, str(index)), where):
            # Not `index`, as empty system turns are left out of `turns`.
            untrained.add(len(turns))
        turns.append(turn)
    if not turns:
        raise Unfit(where, f"field {name} holds no turn but empty system turns", LEAVE_OUT)
    return Conversation(turns, _fields(row, name, where), frozenset(untrained))


def entries_of(row: Row, name: str, where: str) -> list[Row]:
    """The turns as the row has them: a list, not empty, of objects. Raises Unfit."""
    value = turns_in(value_at(row, (name,), where))
    if not isinstance(value, list):
        raise Unfit(where, f"field {name} is {kind_of(value)}, not a list of turns", _shape(name))
    entries = cast("list[object]", value)
    if not entries:
        raise Unfit(where, f"field {name} is an empty list", "leave such rows out of the file")
    for entry in entries:
        if not isinstance(entry, dict):
            raise Unfit(where, f"a turn in {name} is {kind_of(entry)}, not an object", _of_no_objects(entries, name))
    return cast("list[Row]", entries)


def turns_in(value: object) -> object:
    """The list that a text is JSON of, as in a table's cell, or that stands in columns; anything else as it is."""
    # "[{" and not "[": plain text may begin with a bracket.
    found = parsed(value) if isinstance(value, str) and value.lstrip().startswith("[{") else value
    # {"from": ["human", "gpt"], "value": ["…", "…"]}: older files of `datasets` keep a list of objects so.
    columns = cast(Row, found if isinstance(found, dict) else {})
    lengths = {len(cast("list[object]", one)) if isinstance(one, list) else -1 for one in columns.values()}
    if columns.keys() & {"role", "from"} and len(lengths) == 1 and -1 not in lengths:
        return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    return cast(object, found)


def _shape(name: str) -> str:
    return f'write {name} as [{{"role": "user", "content": "…"}}, …], or as [{{"from": "human", "value": "…"}}, …]'


def _of_no_objects(entries: list[object], name: str) -> str:
    """What to do about a list of something else than turns."""
    if all(isinstance(entry, str) for entry in entries):
        turns = '[to_entries[] | {role: (if .key % 2 == 0 then "user" else "assistant" end), content: .value}]'
        return f"name one of them, as in {{{name}[0]}}; or, if speakers take turns, {_by_jq(name, turns)}"
    if all(isinstance(entry, list) and len(cast("list[object]", entry)) == 2 for entry in entries):
        return _by_jq(name, "map({role: .[0], content: .[1]})")
    return _shape(name)


def _of_other_names(entry: Row, name: str) -> str:
    """What to do about a turn that has no role or no content under these names."""
    role = next((key for key in ("role", "from", "author", "speaker", "sender") if key in entry), None)
    said = next((key for key in ("content", "value", "text", "message", "utterance") if key in entry), None)
    if role is not None and said is not None:
        return _by_jq(name, f"map({{role: .{role}, content: .{said}}})")
    if {"input", "output"} <= entry.keys():
        return _by_jq(name, 'map({role: "user", content: .input}, {role: "assistant", content: .output})')
    return f"the turn has the fields {', '.join(entry)}: {_shape(name)}"


def _by_jq(name: str, turns: str) -> str:
    return f"write turns: `jq -c '.{name} |= {turns}' FILE > NEW`"


def _turn(row: Row, path: tuple[str, ...], entry: Row, where: str, *, may_be_blank: bool) -> Turn:
    said_by = "from" if "from" in entry and "role" not in entry else "role"
    said = "value" if "value" in entry and "content" not in entry else "content"
    if said_by not in entry or not entry.keys() & {said, "tool_calls", "function_call", *REASONING}:
        missing = shown((*path, said_by if said_by not in entry else said))
        raise Unfit(where, f"field {missing} is missing", _of_other_names(entry, path[0]))
    role = _role(row, (*path, said_by), where)
    handled = {said_by, said, "function_call", *WEIGHTS}
    # Keys such as name and tool_call_id go on to the chat template; null ones do not, since templates ask `is defined`.
    turn: Turn = {key: value for key, value in entry.items() if value is not None and key not in handled}
    turn |= {"role": "assistant" if role == "call" else role, "content": ""}
    if role == "call":
        # In ShareGPT's form the text of a function_call turn is the call itself, as JSON.
        turn["tool_calls"] = _calls(entry.get(said), (*path, said), where)
    elif calls := entry.get("tool_calls") or entry.get("function_call"):
        turn["tool_calls"] = _calls(calls, (*path, "tool_calls"), where)
    else:
        turn.pop("tool_calls", None)
    if role == "call":
        return turn
    # An assistant may call a tool or think without a text, and a tool may return nothing.
    blank_ok = may_be_blank or role in ("system", "tool") or is_full(turn)
    if not (blank_ok and is_blank(row, (*path, said))):
        turn["content"] = _content(row, (*path, said), where, is_result=role == "tool")
    return turn


def is_full(turn: Turn) -> bool:
    """Whether a turn says something: text, a call or a thought."""
    return bool(turn["content"].strip() or turn.get("tool_calls") or any(turn.get(key) for key in REASONING))


def _role(row: Row, path: tuple[str, ...], where: str) -> str:
    speaker = cast(object, value_at(row, path, where))
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise Unfit(where, f"field {shown(path)} is {speaker!r}", f"write one of {', '.join(ROLES)}")
    return role


def _content(row: Row, path: tuple[str, ...], where: str, *, is_result: bool) -> str:
    """The text of a turn. Parts that are text are joined; what a tool returned as an object is written as JSON."""
    value = cast(object, value_at(row, path, where))
    if isinstance(value, list) and value:
        parts = [_part(part, path, where) for part in cast("list[object]", value)]
        # The joined text is not in the row; this checks it under the field's name.
        return text_at({path[0]: "".join(parts)}, path[:1], where)
    if isinstance(value, dict):
        if is_result:
            return json.dumps(value, ensure_ascii=False)
        raise Unfit(where, f"field {shown(path)} is an object, not text", "write it as the text that is meant")
    return text_at(row, path, where)


def _part(part: object, path: tuple[str, ...], where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        text, kind = (cast(Row, part).get(key) for key in ("text", "type"))
        if isinstance(text, str):
            return text
        raise Unfit(
            where, f"field {shown(path)} holds a part of type {kind!r}", "only text can be trained: " + LEAVE_OUT
        )
    raise Unfit(where, f"field {shown(path)} holds {kind_of(part)} among its parts, not text", LEAVE_OUT)


def _calls(value: object, path: tuple[str, ...], where: str) -> list[Row]:
    """Calls of tools in the form that chat templates expect, arguments as objects."""
    found = parsed(value)
    calls = cast("list[object]", found if isinstance(found, list) else [found])
    if not calls or not all(isinstance(call, dict) and _named(cast(Row, call)) for call in calls):
        remedy = 'write a call as {"type": "function", "function": {"name": "…", "arguments": {…}}}'
        raise Unfit(where, f"field {shown(path)} is no list of tool calls", remedy)
    return [_call(cast(Row, call), path, where) for call in calls]


def _named(call: Row) -> bool:
    function = cast(object, call.get("function", call))
    return isinstance(function, dict) and isinstance(cast(Row, function).get("name"), str)


def _call(call: Row, path: tuple[str, ...], where: str) -> Row:
    wrapped = call if "function" in call else {"function": call}
    function = {**wrapped["function"], "arguments": _arguments(wrapped["function"], path, where)}
    return {"type": "function", **{key: value for key, value in wrapped.items() if value is not None}} | {
        "function": function
    }


def _arguments(function: Row, path: tuple[str, ...], where: str) -> object:
    """What a call was made with. A text that is JSON of an object is read once."""
    value = cast(object, function.get("arguments", function.get("parameters")))
    # OpenAI has arguments as a JSON text; most templates expect an object and would quote a text once more.
    found = parsed(value)
    if value is None or value == "":
        return {}
    if isinstance(found, str) and found.lstrip().startswith("{"):
        raise Unfit(where, f"field {shown(path)} has a call whose arguments are broken JSON", LEAVE_OUT)
    return cast(Row, found) if isinstance(found, dict) else value


def parsed(value: object) -> Any:
    """The value that a text is JSON of; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    # json recurses: a text of thousands of brackets exhausts the stack.
    except (ValueError, RecursionError):
        return value


def _is_trained(entry: Row, path: tuple[str, ...], where: str) -> bool:
    if masked := next((key for key in MASKS if entry.get(key) is not None), None):
        remedy = "write weight = 1 or 0 for each turn instead, or remove the key"
        raise Unfit(where, f"field {shown((*path, masked))} marks what is trained, and is not read", remedy)
    given = {key: entry[key] for key in WEIGHTS if entry.get(key) is not None}
    for key, value in given.items():
        # True and 1.0 are equal to 1, so they pass.
        if value not in (0, 1):
            problem = f"field {shown((*path, key))} is {value!r}, neither 0 nor 1"
            raise Unfit(where, problem, "a turn is trained or it is not: write 1 or 0")
    return all(given.values())


def _fields(row: Row, name: str, where: str) -> Row:
    """What a template may ask for: the row's other fields, tools read, and its own template arguments opened."""
    found = {key: value for key, value in row.items() if value is not None and key != name}
    for key, reader in _SPECIAL.items():
        if key in found:
            found |= reader(found.pop(key), where)
    return found


def _functions(value: object, where: str) -> Row:
    """Definitions in the form that OpenAI had before tools."""
    tools = _tools(value, where)
    return {key: [{"type": "function", "function": tool} for tool in found] for key, found in tools.items()}


def _tools(value: object, where: str) -> Row:
    tools = parsed(value)
    if (isinstance(tools, str) and not tools.strip()) or tools in ([], {}):
        return {}
    if not isinstance(tools, list):
        raise Unfit(where, f"field tools is {kind_of(tools)}, not a list", "write tools as a list of definitions")
    # Some files have each definition as a JSON text of its own.
    found = [parsed(tool) for tool in cast("list[object]", tools)]
    if (odd := next((tool for tool in found if not isinstance(tool, dict)), found)) is not found:
        remedy = 'write a definition as {"type": "function", "function": {"name": "…", …}}'
        raise Unfit(where, f"field tools holds {kind_of(odd)} among its definitions", remedy)
    return {"tools": found}


def _kwargs(value: object, where: str) -> Row:
    kwargs = parsed(value)
    if not isinstance(kwargs, dict):
        problem = f"field chat_template_kwargs is {kind_of(kwargs)}, not an object"
        raise Unfit(where, problem, 'write it as {"enable_thinking": false}')
    return {key: value for key, value in cast(Row, kwargs).items() if value is not None}


_SPECIAL: dict[str, Callable[[object, str], Row]] = {
    "functions": _functions,
    "tools": _tools,
    "chat_template_kwargs": _kwargs,
}
