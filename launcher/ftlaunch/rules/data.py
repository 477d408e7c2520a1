"""Rules between the keys of one [data.NAME] table."""

from collections.abc import Callable, Iterator
from pathlib import Path

from msgspec import Struct

from ftlaunch.errors import Problem, UserError
from ftlaunch.load import Loaded
from ftlaunch.load.messages import as_toml
from ftlaunch.load.paths import is_file
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.names import is_local
from ftlaunch.rows import looks
from ftlaunch.rows.conversations import PAIRED, row_format
from ftlaunch.rows.template import template_fields
from ftlaunch.safety import trust

CONVERSATIONS = ("messages", "sharegpt")
"""Formats whose rows hold whole conversations."""
TAKERS = {
    "text_field": ("text",),
    "messages_field": CONVERSATIONS,
    "chosen": ("preference",),
    "rejected": ("preference",),
    "margin_field": ("preference",),
    "preference_field": ("preference",),
    "label_field": ("unpaired",),
    "group_by": ("ratings",),
    "best_rating": ("ratings",),
    "answers_field": ("ratings",),
    "answer_field": ("ratings",),
    "rating_field": ("ratings",),
}
"""Keys that only some formats look at, and these formats."""


class DataTable(Struct, frozen=True):
    """A [data.NAME] table and where it stands."""

    loaded: Loaded
    name: str
    data: Data

    @property
    def format(self) -> str | None:
        """The format that counts; None where the table leaves it open."""
        return None if looks.is_open(self.data) else row_format(self.data)

    def given(self, key: str) -> bool:
        return self.loaded.where.given(("data", self.name, key))

    def problem(self, key: str, message: str, remedy: str) -> Problem:
        path = ("data", self.name, key) if key else ("data", self.name)
        return self.loaded.problem(path, message, remedy)


def data_tables(loaded: Loaded) -> Iterator[DataTable]:
    """The recipe's data tables."""
    for name, data in loaded.recipe.data.items():
        yield DataTable(loaded, name, data)


def prompt_is_there(table: DataTable) -> Iterator[Problem]:
    if table.data.format is None and table.format == "prompt" and table.data.prompt is None:
        yield table.problem("prompt", "is missing, and completion is given", 'add prompt = "…"')


def ranks_say_which_is_best(table: DataTable) -> Iterator[Problem]:
    data = table.data
    if table.format == "ratings" and data.best_rating is None and "rank" in data.rating_field.lower():
        message = (
            f"is missing: of ranks, such as {data.rating_field}, mostly the lowest is the best, and of ratings not"
        )
        yield table.problem("best_rating", message, 'write best_rating = "lowest" or "highest"')


def better_is_told_once(table: DataTable) -> Iterator[Problem]:
    if table.data.margin_field is not None and table.data.preference_field is not None:
        yield table.problem("margin_field", "is given together with preference_field", "keep the one that is meant")


def only_texts_are_split(table: DataTable) -> Iterator[Problem]:
    # None: only the trainer can see which format the rows of a hub data set have.
    if table.data.overlong == "split" and table.format not in (None, "text"):
        message = f'"split" is for format "text", and this is {as_toml(table.format or "")}: an answer needs its prompt'
        yield table.problem("overlong", message, 'write "truncate" or "drop"')


def templates_suit_format(table: DataTable) -> Iterator[Problem]:
    if table.data.format in (None, "prompt", "unpaired"):
        return
    # A pair's prompt may come from a template; a conversation has its own.
    used = ("prompt",) if table.data.format in PAIRED else ()
    keys = [key for key in ("prompt", "completion") if table.given(key) and key not in used]
    if keys:
        named = as_toml(table.data.format)
        message = f'{named} has no use for {" and ".join(keys)}, which make rows of format "prompt"'
        yield table.problem("format", message, "keep either the format or the templates")


def chosen_and_rejected_together(table: DataTable) -> Iterator[Problem]:
    given = {"chosen": table.data.chosen is not None, "rejected": table.data.rejected is not None}
    if sum(given.values()) == 1:
        # False sorts before True, so the key that is given comes first.
        here, missing = sorted(given, key=lambda key: not given[key])
        yield table.problem(missing, f"is missing, and {here} is given", f'add {missing} = "…", or remove {here}')


def ratings_need_a_prompt(table: DataTable) -> Iterator[Problem]:
    if table.format == "ratings" and table.data.prompt is None:
        yield table.problem("prompt", 'is missing: the format "ratings" needs it', 'add prompt = "{instruction}"')


def templates_parse(table: DataTable) -> Iterator[Problem]:
    for key in ("prompt", "completion", "chosen", "rejected", "system"):
        try:
            template_fields(getattr(table.data, key) or "")
        except UserError as error:
            yield table.problem(key, error.message, error.remedy)


def answers_have_a_field(table: DataTable) -> Iterator[Problem]:
    for key in ("completion", "chosen", "rejected"):
        template = getattr(table.data, key)
        if template is not None and "{" not in template:
            remedy = "name the row's field in braces, as in {answer}"
            yield table.problem(key, "has no field, so every row would be trained on the same answer", remedy)


def keys_suit_format(table: DataTable) -> Iterator[Problem]:
    """A key is refused where it would do nothing."""
    for key, formats in TAKERS.items():
        # `given`, as some of these keys have a default, which every table holds.
        if table.format and table.given(key) and table.format not in formats:
            names = " or ".join(map(as_toml, formats))
            message = f"counts only for format {names}, and this is {as_toml(table.format)}"
            yield table.problem(key, message, f"remove it, or write format = {names}")


def pairs_train_their_answers(table: DataTable) -> Iterator[Problem]:
    if table.format in PAIRED and table.data.train_on != "answer":
        message = f"{as_toml(table.data.train_on)} has no place in pairs, whose answers are compared"
        yield table.problem("train_on", message, "remove it")


def pairs_are_not_streamed(table: DataTable) -> Iterator[Problem]:
    if table.format in PAIRED and table.data.streaming:
        yield table.problem("streaming", "pairs are tokenized before the first step", "remove it, or set limit")


def assistant_turns_need_conversations(table: DataTable) -> Iterator[Problem]:
    if table.data.train_on == "assistant" and table.format and table.format not in (*CONVERSATIONS, *PAIRED):
        message = f'"assistant" needs rows with whole conversations, and this is format {as_toml(table.format)}'
        yield table.problem("train_on", message, 'write train_on = "answer", or format = "messages" or "sharegpt"')


def text_has_no_system_turn(table: DataTable) -> Iterator[Problem]:
    if table.format == "text" and table.data.system is not None:
        yield table.problem("system", 'has no place in format "text", whose rows have no turns', "remove it")


def streams_hold_out_a_count(table: DataTable) -> Iterator[Problem]:
    test = table.data.test
    if table.data.streaming and isinstance(test, float) and test > 0:
        message = f"{test:g} of a stream cannot be held out, as its length is not known"
        yield table.problem("test", message, "write a count of rows, such as test = 100")


def evaluation_is_told_once(table: DataTable) -> Iterator[Problem]:
    data = table.data
    if data.eval is not None and data.test:
        yield table.problem(
            "test", "is given together with eval, which has the rows to evaluate on", "keep one of them"
        )
    is_split = data.eval is not None and not Path(data.eval).is_absolute()
    # The files of a folder or a pattern can belong to splits by their names, a single file cannot.
    if is_split and is_file(Path(data.path)):
        message = f"{as_toml(str(data.eval))} is no file, and {data.path} has no splits"
        yield table.problem("eval", message, 'name a file, as in eval = "validation.jsonl", or hold rows out with test')


def prompts_can_be_told(table: DataTable) -> Iterator[Problem]:
    # Rows of one prompt may be far apart, so all of them must be known before some are held out.
    if table.data.test_by == "prompt" and (table.format == "text" or table.data.streaming or not table.data.test):
        why = "no rows are held out" if not table.data.test else "these rows have no prompts, or are not all at hand"
        yield table.problem("test_by", f'"prompt" has no place here: {why}', "remove it")


def rows_are_left_to_train_on(table: DataTable) -> Iterator[Problem]:
    test, limit = table.data.test, table.data.limit
    # A fraction is below 1 and so below every limit.
    if limit is not None and test >= limit:
        message = f"holds out {test:g} of at most {limit} rows and leaves none to train on"
        yield table.problem("test", message, f"write test below {limit}, or raise limit")


def template_is_ours(table: DataTable) -> Iterator[Problem]:
    """A chat template is a program, if one in a sandbox."""
    if not Path(table.data.template).is_absolute():
        return
    try:
        trust.require(Path(table.data.template))
    except UserError as error:
        yield table.problem("template", error.message, error.remedy)


def hub_keys_need_a_hub_id(table: DataTable) -> Iterator[Problem]:
    if not is_local(table.data.path):
        return
    for key in ("config", "split", "revision"):
        # A folder's or a pattern's files are told apart by name.
        has_splits = key == "split" and not is_file(Path(table.data.path))
        if table.given(key) and not has_splits:
            message = f"counts only for a data set of the hub, and {table.data.path} is on this machine"
            yield table.problem(key, message, "remove it")


RULES: tuple[Callable[[DataTable], Iterator[Problem]], ...] = (
    prompt_is_there,
    templates_suit_format,
    ranks_say_which_is_best,
    better_is_told_once,
    only_texts_are_split,
    chosen_and_rejected_together,
    ratings_need_a_prompt,
    templates_parse,
    answers_have_a_field,
    keys_suit_format,
    pairs_train_their_answers,
    pairs_are_not_streamed,
    assistant_turns_need_conversations,
    text_has_no_system_turn,
    streams_hold_out_a_count,
    evaluation_is_told_once,
    prompts_can_be_told,
    rows_are_left_to_train_on,
    template_is_ours,
    hub_keys_need_a_hub_id,
)
