"""`ftlaunch preview`: what training will see.

For each data set: what became of its rows, and some of them as the model gets them, trained tokens marked.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
from msgspec import structs

from ftlaunch.recipe.data import Data
from ftlaunch.recipe.model import Model
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.recipe.stages import Ppo, Training
from ftlaunch.run.records import Counts
from ftlaunch.tools import PreviewOptions
from fttrain.data.held_out import on_both_sides
from fttrain.data.prompts import load_prompts
from fttrain.data.sources import load_rows, settled
from fttrain.data.token_set import PairSet, TokenSet, token_set
from fttrain.data.tokens import Tokenized, cache_root, stream, tokenize
from fttrain.tools.output import run

STREAMED_ROWS = 200
"""Rows of streamed data that are looked at."""
SAMPLED_ROWS = 2000
"""Rows that are looked at of other data sets that have more."""

Piece = tuple[str, bool]
"""A stretch of a row's text, and whether it is trained."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """One data set as training will see it."""

    name: str
    counts: Counts
    paired: bool = False
    """Rows are pairs of answers: lengths are of both, and samples come by twos, the chosen one first."""
    streamed: bool = False
    """Only the first rows were looked at."""
    sampled: bool
    """Whether only the first rows were read, as there are many."""
    held_out: int
    shared: int = 0
    """Rows held out whose prompt is trained on, too."""
    longest: int
    """Tokens of the longest row."""
    mean_length: float
    samples: list[list[Piece]]


def main(options: PreviewOptions) -> Iterator[str]:
    """Return the preview, with colours where stdout is a terminal."""
    return _previewed(options, green if sys.stdout.isatty() else bracketed)


def _previewed(options: PreviewOptions, mark: Callable[[str], str]) -> Iterator[str]:
    previews = look_at(options.recipe, options.rows)
    if options.json:
        yield json.dumps([as_json(preview) for preview in previews], ensure_ascii=False, indent=2)
    else:
        yield "\n\n".join(as_text(preview, mark) for preview in previews)


def look_at(recipe: Recipe, rows: int) -> list[Preview]:
    """A preview of each data set that a stage trains on. Raises UserError as `tokenize` does."""
    tokenizers: dict[tuple[str, str | None], Any] = {}
    previews: list[Preview] = []
    for name, model, is_asked in _trained_on(recipe):
        key = (model.path, model.revision)
        # Stages often share a model, and a large tokenizer takes a second to load.
        tokenizers[key] = tokenizers.get(key) or load_tokenizer(*key)
        data = settled(recipe.data[name], only_prompts=is_asked)
        show = _of_prompts if is_asked else preview
        previews.append(show(name, data, tokenizers[key], recipe.seed, rows))
    return previews


def preview(name: str, data: Data, tokenizer: Any, seed: int, rows: int) -> Preview:
    """One data set's, with up to `rows` samples of the part that is trained on."""
    sample, shared = None, 0
    if data.streaming:
        train = token_set(islice(stream(data, tokenizer, seed), STREAMED_ROWS))
        # A stream's test rows are its first ones, which the stream of training rows leaves out.
        counts, held_out, lengths = _counts(train), int(data.test), train.lengths
    else:
        sample = _sample_of(data)
        tokenized = _tokenized(data, sample, tokenizer, seed)
        train, counts, held_out = tokenized.train, tokenized.counts, len(tokenized.test)
        lengths = np.concatenate([train.lengths, tokenized.test.lengths])
        shared = on_both_sides(train, tokenized.test)
    shown = [train.group(index).rows for index in range(min(rows, len(train)))]
    samples = [pieces(*row, tokenizer) for group in shown for row in group]
    return Preview(
        name=name,
        counts=counts,
        paired=isinstance(train, PairSet),
        streamed=data.streaming,
        sampled=sample is not None,
        held_out=held_out,
        shared=shared,
        longest=int(lengths.max()),
        mean_length=float(lengths.mean()),
        samples=samples,
    )


def _tokenized(data: Data, sample: Data | None, tokenizer: Any, seed: int) -> Tokenized:
    """The rows of the data set, which are kept for the run, or those of a sample of it, which are not."""
    if sample is None:
        return tokenize(data, tokenizer, seed, cache_root())
    # In a folder of its own: the run must not find a sample in the cache where it looks for the whole set.
    with TemporaryDirectory() as folder:
        return tokenize(sample, tokenizer, seed, Path(folder))


def _sample_of(data: Data) -> Data | None:
    """Return the data set cut to its first rows; None where it has no more than these."""
    # One row more than the sample is enough to know: counting all of a large file would take minutes.
    if sum(1 for _ in islice(load_rows(data), SAMPLED_ROWS + 1)) <= SAMPLED_ROWS:
        return None
    # A count larger than the sample would leave nothing to train on, and be refused.
    test = min(data.test, SAMPLED_ROWS // 2) if isinstance(data.test, int) else data.test
    return structs.replace(data, limit=SAMPLED_ROWS, test=test)


def _of_prompts(name: str, data: Data, tokenizer: Any, seed: int, rows: int) -> Preview:
    """Return the preview of rows that are answered in training; nothing of them is trained."""
    sample = _sample_of(data)
    prompts = load_prompts(sample or data, tokenizer, seed)
    every = [*prompts.train, *prompts.test]
    lengths = np.array([len(prompt.ids_T) for prompt in every])
    return Preview(
        name=name,
        counts=prompts.counts,
        sampled=sample is not None,
        held_out=len(prompts.test),
        longest=int(lengths.max()),
        mean_length=float(lengths.mean()),
        samples=[pieces(one.ids_T, np.zeros(len(one.ids_T), dtype=bool), tokenizer) for one in prompts.train[:rows]],
    )


def pieces(ids_T: np.ndarray, trained_T: np.ndarray, tokenizer: Any) -> list[Piece]:
    """The row's text, special tokens included, cut where training begins and ends."""
    runs = groupby(zip(ids_T.tolist(), trained_T.tolist(), strict=True), key=lambda token: token[1])
    return [(tokenizer.decode([token for token, _ in run]), trained) for trained, run in runs]


def as_text(preview: Preview, mark: Callable[[str], str]) -> str:
    """A few lines of numbers, then the samples."""
    counts = preview.counts
    first = f" (the first {counts.kept} of a stream)" if preview.streamed else ""
    first = " (the first ones: a run tokenizes all)" if preview.sampled else first
    kind = "pairs" if preview.paired else "rows"
    lines = [
        f"{preview.name}: {counts.kept} of {counts.rows} rows{first}, {preview.held_out} held out",
        f"  tokens     {counts.tokens}, {counts.trained} of them trained",
        f"  length     {preview.mean_length:.1f} tokens on average, {preview.longest} the longest",
        f"  truncated  {counts.truncated} {kind}, by {counts.lost} tokens",
        *_left_out(counts),
    ]
    if preview.shared:
        lines.insert(1, f"  shared     {preview.shared} rows held out have a prompt that is trained on, too")
    if counts.split:
        lines.insert(-1, f"  split      {counts.split} rows into several")
    if counts.parted:
        parted = f"{counts.parted} {kind} with a token across the border of prompt and answer, parted there"
        lines.insert(-1, f"  borders    {parted}")
    if counts.control:
        lines.insert(-1, f"  control    {counts.control} {kind} with a control token in a text, encoded as text")
    if counts.respaced:
        respaced = f"{counts.respaced} {kind} with answers whose white space the chat template changes"
        lines.insert(-1, f"  space      {respaced}; first {counts.first_respaced}")
    for number, sample in enumerate(preview.samples, start=1):
        text = "".join(mark(part) if trained else part for part, trained in sample)
        lines += [f"  {_title(number, preview)}", text.rstrip("\n")]
    return "\n".join(lines)


def _left_out(counts: Counts) -> list[str]:
    reasons = {**counts.unfit, **counts.excused}
    if counts.dropped_untrained:
        reasons["no token to train"] = counts.dropped_untrained
    told = ", ".join(f"{count} × {reason}" for reason, count in reasons.items())
    return [f"  left out   {told or 'none'}", *(f"             {example}" for example in counts.examples)]


def _title(number: int, preview: Preview) -> str:
    if not preview.paired:
        return f"row {number}"
    return f"pair {(number + 1) // 2}, {'chosen' if number % 2 else 'rejected'}"


def as_json(preview: Preview) -> dict[str, Any]:
    """The same as plain values."""
    return {
        "name": preview.name,
        **msgspec.to_builtins(preview.counts),
        **{key: value for key, value in vars(preview).items() if key != "counts"},
        "samples": [[{"text": text, "trained": trained} for text, trained in sample] for sample in preview.samples],
    }


def green(text: str) -> str:
    """Return the text on a green ground, line by line, so that a terminal does not fill whole lines."""
    return "\n".join(f"\033[30;42m{line}\033[0m" if line else "" for line in text.split("\n"))


def bracketed(text: str) -> str:
    """Return the text in brackets, for output that is no terminal."""
    return f"⟦{text}⟧"


def load_tokenizer(path: str, revision: str | None) -> Any:
    """Raises UserError where there is none."""
    from fttrain.model.scorer import load_tokenizer as load  # torch takes seconds to import

    return load(path, revision)


def _trained_on(recipe: Recipe) -> list[tuple[str, Model, bool]]:
    """Each data set with the model whose tokenizer it gets and whether it gives prompts only, without repeats."""
    found: list[tuple[str, Model, bool]] = []
    for stage in recipe.stage:
        if isinstance(stage, Training):
            found += [(name, stage.model or recipe.model, isinstance(stage, Ppo)) for name in stage.data_names]
    return list(dict.fromkeys(found))


def _counts(train: TokenSet) -> Counts:
    tokens, trained = int(train.lengths.sum()), int(train.supervised.sum())
    return Counts(rows=len(train), kept=len(train), tokens=tokens, trained=trained)


if __name__ == "__main__":
    run(main, PreviewOptions)
