"""The vocabulary of [data.NAME]: where rows come from, and what of them is trained."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from ftlaunch.recipe.types import Above0, Positive, Text


class Data(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One data set: where its rows are, how a row becomes text, and which tokens are trained."""

    path: Text
    """A .csv, .json, .jsonl or .parquet file, a folder of such files, or a hub id."""
    config: Text | None = None
    """Configuration (subset) of a hub data set."""
    split: Text = "train"
    """Split of a hub data set."""
    revision: Text | None = None
    """Commit, tag or branch of a hub data set."""
    format: Literal["prompt", "text", "messages", "alpaca", "sharegpt", "preference", "ratings"] | None = None
    """Shape of a row. None: "prompt" where `prompt` and `completion` are given, "preference" where `chosen` and
    `rejected` are; otherwise it must be named. "preference" rows hold a better and a worse answer, "ratings" rows
    several answers with numbers, of which the best and the worst make a pair."""
    prompt: Text | None = None
    """Template of the user's turn over the row's fields: "Question: {question}", "{answer[value]}"."""
    completion: Text | None = None
    """Template of the answer over the row's fields."""
    chosen: Text | None = None
    """Template of the better answer, for format "preference". None: the field "chosen", a text or a list of turns.
    A text in which Human: and Assistant: take turns, and turns that begin with the user's, hold their prompt."""
    rejected: Text | None = None
    """Template of the worse answer, as `chosen`."""
    margin_field: Text | None = None
    """Field with a number from 0 up, for format "preference": how much better the chosen answer is.
    None: 1. For "ratings" it is the difference of the two ratings."""
    answers_field: Text = "completions"
    """Field with the list of answers, for format "ratings"."""
    answer_field: Text = "response"
    """Field of such an answer with its text."""
    rating_field: Text = "overall_score"
    """Field of such an answer with its rating, a number, higher for better."""
    system: Text | None = None
    """Template of a system turn put before every conversation that has none."""
    text_field: Text = "text"
    """Field with the text, for format "text"."""
    messages_field: Text | None = None
    """Field with the list of turns. None: "messages" for format "messages", "conversations" for "sharegpt"."""
    template: Text = "tokenizer"
    """Chat template: "tokenizer" (its own), "llama2", "chatml", "none" (prompt and answer as are), or a Jinja file."""
    train_on: Literal["answer", "assistant", "all"] = "answer"
    """Tokens that are trained: the last answer, every assistant turn, or everything."""
    max_length: Annotated[int, Meta(ge=8)] = 1024
    """Longest row in tokens."""
    overlong: Literal["truncate", "drop"] = "truncate"
    """What happens to a longer row: its end is cut off, or it is left out. Either is counted and shown.
    Of a pair each answer is cut by itself; one that then trains nothing, or is the same, leaves its pair out."""
    limit: Positive | None = None
    """Take at most so many rows."""
    test: Annotated[int, Meta(ge=0)] | Annotated[float, Meta(ge=0, lt=1)] = 0
    """Rows held out for evaluation, drawn with the recipe's seed: a count (100) or a fraction (0.05)."""
    weight: Above0 = 1.0
    """Share in a mixture of several data sets, relative to the others' weights."""
    streaming: bool = False
    """Read rows as training goes instead of first. The stage then needs `steps`, and `test` a count."""
