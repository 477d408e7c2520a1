"""A row → the text or the conversation that it stands for, in each format of `Data`."""

from collections.abc import Callable, Collection
from typing import Any, Final, cast

from ftlaunch.recipe.data import Data
from ftlaunch.rows.messages import Conversation, Turn, message_turns, turns_in
from ftlaunch.rows.template import Excused, Row, Unfit, bare_field, fill, is_blank, kind_of, text_at, value_at

LISTS = ("messages", "conversations", "conversation")
"""Fields that list turns, where no `messages_field` names another."""
PAIRED: Final = ("preference", "ratings")
"""Formats whose rows hold a better and a worse answer."""


def row_format(data: Data) -> str:
    """The format's name; where it is left open the templates tell it."""
    return data.format or ("prompt" if data.chosen is None and data.rejected is None else "preference")


def is_paired(data: Data) -> bool:
    """Whether rows become pairs of answers."""
    return row_format(data) in PAIRED


def is_text(data: Data) -> bool:
    """Whether rows are plain texts, without turns."""
    return row_format(data) == "text"


def agreed_arguments(datas: Collection[Data]) -> dict[str, Any]:
    """The template arguments that all of the data sets set alike."""
    named = {name: value for data in datas for name, value in data.template_arguments.items()}
    all_set = [data.template_arguments for data in datas]
    return {name: value for name, value in named.items() if all(one.get(name) == value for one in all_set)}


def text_of(data: Data, row: Row, where: str) -> str:
    """The text of a row of format "text". Raises Unfit; that a text is blank is no mistake."""
    # A text without content is no mistake. A field that is missing or null is one, which text_at reports.
    if is_blank(row, (data.text_field,)) and isinstance(row.get(data.text_field), str):
        raise Excused(where, f"field {data.text_field} is blank", "blank rows are left out")
    return text_at(row, (data.text_field,), where)


def conversation_of(data: Data, row: Row, where: str) -> Conversation:
    """The conversation of a row of any other format, ready to render and with at least one turn.

    It may begin with one system turn, goes on with a user turn, and ends with the assistant's unless everything is
    trained. Raises Unfit naming `where` and the field that is wrong.
    """
    return finished(read_conversation(data, row, where), data, row, where)


def read_conversation(data: Data, row: Row, where: str) -> Conversation:
    """The turns that stand in the row, at least one; of format "prompt" without a completion the user's alone."""
    return _READERS[row_format(data)](data, row, where)


def finished(conversation: Conversation, data: Data, row: Row, where: str) -> Conversation:
    """The turns, after `data.system` where they have no system turn. Raises Unfit where they cannot be trained."""
    if data.system is not None and conversation.turns[0]["role"] != "system":
        system = fill(data.system, row, where)
        # "{system?}" is empty in a row without a system text, which then gets no system turn.
        if system.strip():
            conversation = Conversation([{"role": "system", "content": system}]).followed_by(conversation)
    _require_trainable(conversation, data, where)
    return conversation


def user(text: str) -> Turn:
    """Return a turn of the user."""
    return {"role": "user", "content": text}


def answer(text: str) -> Turn:
    """Return a turn of the assistant."""
    return {"role": "assistant", "content": text}


def _from_prompt(data: Data, row: Row, where: str) -> Conversation:
    asked = turns_of(row, "prompt", data.prompt, lambda text: [user(text)], where)
    # A recipe that gives only the prompt's template wants prompts alone, even if rows have a field "completion".
    if data.completion is None and (data.prompt is not None or "completion" not in row):
        return asked
    return asked.followed_by(turns_of(row, "completion", data.completion, lambda text: [answer(text)], where))


def turns_of(row: Row, name: str, template: str | None, said: Callable[[str], list[Turn]], where: str) -> Conversation:
    """The turns of a template, or of a field that is a text or lists turns; `said` makes those of a text."""
    if template is None:
        if isinstance(turns_in(value_at(row, (name,), where)), list):
            return message_turns(row, name, where)
        return Conversation(said(text_at(row, (name,), where)))
    # A text that is JSON of a list stays one under a template, as the answers of some files are such.
    if (listed := bare_field(template)) is not None and isinstance(row.get(listed), list):
        return message_turns(row, listed, where)
    return Conversation(said(fill(template, row, where)))


def _from_alpaca(data: Data, row: Row, where: str) -> Conversation:
    """`input` may be missing, null or blank: most rows of such files have none.

    Where no template marks the turns, Alpaca's own headings do (github.com/tatsu-lab/stanford_alpaca).
    """
    parts = {"Instruction": text_at(row, ("instruction",), where)}
    if not is_blank(row, ("input",)):
        parts["Input"] = text_at(row, ("input",), where)
    plain = "\n\n".join(parts.values())
    headed = "".join(f"### {heading}:\n{text}\n\n" for heading, text in parts.items()) + "### Response:\n"
    asked = user(headed if data.template == "none" else plain)
    return Conversation([*_history(row, where), asked, answer(text_at(row, ("output",), where))])


def _history(row: Row, where: str) -> list[Turn]:
    """What was said before, as LLaMA-Factory's files have it: [[prompt, answer], …]."""
    if is_blank(row, ("history",)):
        return []
    said = value_at(row, ("history",), where)
    if not isinstance(said, list):
        remedy = 'write it as [["prompt", "answer"], …], or leave it out'
        raise Unfit(where, f"field history is {kind_of(said)}, not a list", remedy)
    turns: list[Turn] = []
    for index in range(len(cast("list[object]", said))):
        # Paths are texts, indices too, as in a template: {history[0][1]}.
        first, second = (text_at(row, ("history", str(index), side), where) for side in ("0", "1"))
        turns += [user(first), answer(second)]
    return turns


def list_field(data: Data, row: Row) -> str:
    """The field of the row that lists its turns."""
    usual = LISTS[1] if data.format == "sharegpt" else LISTS[0]
    return data.messages_field or next((name for name in (usual, *LISTS) if name in row), usual)


def _from_messages(data: Data, row: Row, where: str) -> Conversation:
    return message_turns(row, list_field(data, row), where)


# Rows of pairs are read by rows.pairs, and plain text has no turns.
_READERS: dict[str, Callable[[Data, Row, str], Conversation]] = {
    "prompt": _from_prompt,
    "unpaired": _from_prompt,
    "alpaca": _from_alpaca,
    "messages": _from_messages,
    "sharegpt": _from_messages,
}


def _require_trainable(conversation: Conversation, data: Data, where: str) -> None:
    roles: list[Any] = [turn["role"] for turn in conversation.turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    if "system" in spoken:
        raise Unfit(where, "a system turn stands after the first turn", "put system turns first, one a row")
    if spoken[:1] != ["user"]:
        remedy = "begin each conversation with a user turn, after the system turn if it has one"
        raise Unfit(where, f"the first turn is {spoken[0] if spoken else 'system'}, not user", remedy)
    if data.train_on == "all":
        return
    if spoken == ["user"] and row_format(data) == "prompt":
        remedy = 'name its field with completion = "{…}"; prompts alone are for a stage of kind ppo'
        raise Unfit(where, "there is a prompt and no answer to train", remedy)
    if spoken[-1] != "assistant":
        remedy = 'cut the row after its last assistant turn, or train everything with train_on = "all"'
        if row_format(data) in ("messages", "sharegpt"):
            remedy += '; or, where the answer is a field, name both: prompt = "{FIELD}", completion = "{ANSWER}"'
        raise Unfit(where, f"the last turn is {spoken[-1]}, not assistant: there is no answer to train", remedy)
    # `untrained` counts the system turn, so the last turn is len(roles) - 1, not len(spoken) - 1.
    if data.train_on == "answer" and len(roles) - 1 in conversation.untrained:
        remedy = 'give it weight 1, leave the row out, or train the other answers with train_on = "assistant"'
        raise Unfit(where, "the last answer has weight 0", remedy)
