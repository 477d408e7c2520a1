"""Held-out prompts with their reference answers: all that the rows have for the same prompt."""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

from ftlaunch.errors import UserError
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.recipe.stages import Need
from ftlaunch.rows.conversations import is_paired, row_format
from fttrain.data.sources import settled
from fttrain.data.token_set import PairSet, TokenSet
from fttrain.data.tokens import Tokenized


@dataclass(frozen=True)
class HeldOutPrompt:
    """A prompt with its reference answers."""

    ids_T: tuple[int, ...]
    """Up to where the answer begins."""
    prompt: str
    references: list[str]
    is_trained: bool
    """Whether rows to train on have the same prompt."""


def data_of(recipe: Recipe, name: str | None, needs: Set[Need] = frozenset({"answers"})) -> tuple[str, Data]:
    """The data table that is asked for, or the only one whose rows have what metrics need.

    Raises UserError where there is none or no only one, and where it could not be told what the answers are.
    """
    tables = {each: settled(data) for each, data in recipe.data.items()}
    fit = [each for each, data in tables.items() if _fits(data, needs)]
    kind = "pairs of answers" if "pairs" in needs else "prompts and answers"
    if name is None and len(fit) != 1:
        message = f"the recipe has {len(fit)} data sets of {kind}: {', '.join(fit) or 'only others'}"
        raise UserError(message, "name one: --data NAME")
    name = name or fit[0]
    if name not in fit:
        message = f"--data {name} is no data set of {kind} of this recipe"
        raise UserError(message, f"name one of these: {', '.join(fit) or 'none is left'}")
    data = tables[name]
    needs_answers = bool(needs & {"answers", "references"})
    if needs_answers and data.prompt is not None and data.completion is None:
        raise UserError(f"the rows of {name} have no answer to compare with", f"set data.{name}.completion")
    if (needs_answers and data.train_on != "answer") or data.streaming:
        remedy = f"--set data.{name}.train_on=answer --set data.{name}.streaming=false"
        raise UserError(f"of {name} only a last answer of rows read at once can be compared with", remedy)
    return name, data


def _fits(data: Data, needs: Set[Need]) -> bool:
    return is_paired(data) == ("pairs" in needs) and ("answers" not in needs or row_format(data) != "text")


def held_out_prompts(rows: Tokenized, tokenizer: Any) -> list[HeldOutPrompt]:
    """The prompts held out, each once and in their order, or all of them where none is held out."""
    parts = [list(_rows(part)) for part in (rows.test, rows.train)]
    trained = {prompt for prompt, _ in parts[1]} if parts[0] else set()
    # A dict keeps the order in which prompts first come, which a set would lose.
    wanted = dict.fromkeys(prompt for prompt, _ in parts[0] or parts[1])
    found: dict[tuple[int, ...], list[str]] = {prompt: [] for prompt in wanted}
    # Rows to train on count, too: their answers to the same prompt are references as good as those held out.
    for prompt, ids in [*parts[0], *parts[1]]:
        if prompt in found:
            found[prompt].append(text_of(tokenizer, ids))
    return [
        HeldOutPrompt(ids, text_of(tokenizer, ids), references, ids in trained) for ids, references in found.items()
    ]


def _rows(part: TokenSet | PairSet) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(prompt, answer) of each row; of a pair the chosen answer."""
    for index in range(len(part)):
        ids_T, trained_T = part.group(index).rows[0]
        start = int(trained_T.argmax())
        yield tuple(ids_T[:start].tolist()), tuple(ids_T[start:].tolist())


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Tokens as a text without the special ones."""
    return tokenizer.decode(ids, skip_special_tokens=True).strip()
