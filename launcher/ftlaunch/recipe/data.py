"""The vocabulary of [data.NAME]: where rows come from, and what of them is trained."""

from typing import Annotated, Literal

from msgspec import Meta, field

from ftlaunch.recipe.types import Above0, DataName, Positive, SplitOrFile, Table, TemplateName, Text


class Data(Table, frozen=True, kw_only=True):
    """One data set: where its rows are, how a row becomes text, and which tokens are trained."""

    path: DataName
    """A .csv, .tsv, .json, .jsonl, .txt or .parquet file (.gz or .zst too), a folder of such files, what `datasets`
    saved, a pattern such as "parts/*.jsonl", or a hub id."""
    config: Text | None = None
    """Configuration (subset) of a hub data set."""
    split: Text = "train"
    """Split that is read, where the hub's data set or the names of a folder's files and subfolders tell splits apart:
    train, validation or test."""
    revision: Text | None = None
    """Commit, tag or branch of a hub data set."""
    format: Literal["prompt", "text", "messages", "alpaca", "sharegpt", "preference", "ratings", "unpaired"] | None = (
        None
    )
    """Shape of a row. None: the templates tell it, or the names of the rows' fields; the plan says which it is.
    "prompt" rows hold a prompt and its completion, "preference" rows a better and a worse answer, "ratings" rows
    several answers with numbers, of which the best and the worst make a pair, "unpaired" rows an answer and whether
    it is a good one."""
    prompt: Text | None = None
    """Template of the user's turn over the row's fields: "Question: {question}", "{answer[value]}". {context?} is empty
    where the row has no context, and {?\\n\\nContext: {context}} vanishes then with all that is in it.
    None: the field "prompt", a text or a list of turns."""
    completion: Text | None = None
    """Template of the answer over the row's fields. None: the field "completion", as `prompt`."""
    chosen: Text | None = None
    """Template of the better answer, for format "preference". None: the field "chosen", a text or a list of turns.
    A text in which Human: and Assistant: take turns, and turns that begin with the user's, hold their prompt."""
    rejected: Text | None = None
    """Template of the worse answer, as `chosen`."""
    margin_field: Text | None = None
    """Field with a number from 0 up, for format "preference": how much better the chosen answer is.
    None: 1. For "ratings" it is the difference of the two ratings."""
    preference_field: Text | None = None
    """Field with a number, for format "preference", that tells which answer is better and by how much: above 0 `chosen`
    is, below 0 `rejected` is, and they are swapped; a row with 0 is left out."""
    label_field: Text = "label"
    """Field that tells whether the answer is a good one, true or false, for format "unpaired"."""
    answers_field: Text = "completions"
    """Field with the list of answers, for format "ratings"."""
    answer_field: Text = "response"
    """Field of such an answer with its text."""
    rating_field: Text = "overall_score"
    """Field of such an answer with its rating, a number."""
    group_by: Text | None = None
    """Field, such as "prompt", for format "ratings" where each row holds one answer and its rating: rows next to each
    other that have the same there are the answers to one prompt."""
    best_rating: Literal["highest", "lowest"] | None = None
    """Which rating is the best: "lowest" for ranks, whose first is 1. None: the highest, unless the field is a rank."""
    system: Text | None = None
    """Template of a system turn put before every conversation that has none; none is put where it comes out empty."""
    text_field: Text = "text"
    """Field with the text, for format "text"."""
    messages_field: Text | None = None
    """Field with the list of turns. None: "messages" for format "messages", "conversations" for "sharegpt"."""
    template: TemplateName = "tokenizer"
    """Chat template: "tokenizer" (its own), "llama2", "chatml", "none" (prompt and answer as are), or a Jinja file.
    Columns that it asks for, such as tools and documents, reach it with the turns."""
    template_arguments: dict[Text, bool | int | float | Text] = field(
        default_factory=dict[Text, bool | int | float | Text]
    )
    """Variables of the chat template, such as enable_thinking = false; a row's own chat_template_kwargs count first."""
    control_tokens: Literal["refuse", "text"] = "refuse"
    """What becomes of a row whose turns hold a control token, such as <|im_end|>, as text: it is unfit, or the token is
    encoded as the text that it is. Never is it control."""
    train_on: Literal["answer", "assistant", "all"] = "answer"
    """Tokens that are trained: the last answer, every assistant turn, or everything. Turns with weight 0 never are."""
    max_length: Annotated[int, Meta(ge=8)] = 1024
    """Longest row in tokens."""
    overlong: Literal["truncate", "drop", "split"] | None = None
    """What happens to a longer row: its end is cut off, it is left out, or it is split into rows, which only "text"
    is. What is lost is counted and shown. Of a pair each answer is cut by itself; one that then trains nothing, or is
    the same, leaves its pair out. None: "split" for format "text", else "truncate"."""
    unfit: Literal["drop", "stop"] = "drop"
    """What happens where a row cannot be trained on, as it is empty, lacks a field or has no answer: it is left out,
    counted and shown, or nothing is trained at all."""
    # Unlike `test` it may be 1: any number of unfit rows is left out then, as long as one fit row remains.
    unfit_share: Annotated[float, Meta(ge=0, le=1)] = 0.1
    """Share of unfit rows above which nothing is trained all the same. Blank rows of text, pairs without a better
    answer and rows that are too long do not count."""
    unread: Literal["refuse", "ignore"] | None = None
    """What happens where rows hold a field that nothing reads and without which they say something else: weight, image,
    audio or video, or a system turn or context that comes after the first rows. None: "refuse" where the fields tell
    the format, "ignore" where you write it."""
    limit: Positive | None = None
    """Take at most so many rows."""
    # TOML keeps the two apart: 1 is one row, and 1.0 would hold out every row, which lt=1 refuses.
    test: Annotated[int, Meta(ge=0)] | Annotated[float, Meta(ge=0, lt=1)] = 0
    """Rows held out for evaluation, drawn with the recipe's seed: a count (100) or a fraction (0.05)."""
    test_by: Literal["row", "prompt"] = "row"
    """Whether single rows are held out, or prompts with all their rows, so that none is on both sides."""
    eval: SplitOrFile | None = None
    """Rows for evaluation of their own, instead of `test`: a split, such as "validation", or a file or folder. They are
    read as the others are, with the same format, templates and `max_length`."""
    weight: Above0 = 1.0
    """Share in a mixture of several data sets, relative to the others' weights."""
    streaming: bool = False
    """Read rows as training goes instead of first. The stage then needs `steps`, and `test` a count."""
