"""Pairs as tokens: what is kept, cut, counted and previewed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftlaunch.errors import UserError
from ftlaunch.recipe.data import Data
from fttrain.data import making, tokens
from fttrain.data.token_set import PairSet
from fttrain.data.tokens import tokenize
from fttrain.tools import preview

Writer = Callable[[Any], str]
ROWS = [
    {"prompt": f"Count to {n}.", "chosen": "one " * n, "rejected": "two " * (1 + n % 3), "by": n / 2}
    for n in range(1, 9)
]


def make_data(path: str, **fields: Any) -> Data:
    return Data(**{"path": path, "format": "preference", "template": "chatml", "margin_field": "by", **fields})


def paired(data: Data, tokenizer: Any, cache: Path) -> PairSet:
    found = tokenize(data, tokenizer, 1, cache).train
    assert isinstance(found, PairSet)
    return found


def trained_text(row: tuple[np.ndarray, np.ndarray], tokenizer: Any) -> tuple[str, str]:
    """(what is not trained, what is)."""
    ids, trained = row
    return tokenizer.decode(ids[~trained].tolist()), tokenizer.decode(ids[trained].tolist())


def test_both_answers_are_trained_after_the_same_prompt(write_rows: Writer, tokenizer: Any, tmp_path: Path) -> None:
    data = make_data(write_rows(ROWS))
    for pairs in (paired(data, tokenizer, tmp_path), paired(data, tokenizer, tmp_path)):  # made, then from the cache
        assert len(pairs) == len(ROWS)
        for index, row in enumerate(ROWS):
            group = pairs.group(index)
            asked = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
            told = [trained_text(answer, tokenizer) for answer in group.rows]
            assert told == [(asked, f"{row[key]}<|im_end|>\n") for key in ("chosen", "rejected")]
            assert group.margin == row["by"]
            assert group.reference is None


def test_a_split_keeps_pairs_and_margins_together(write_rows: Writer, tokenizer: Any, tmp_path: Path) -> None:
    whole = paired(make_data(write_rows(ROWS)), tokenizer, tmp_path)
    tokenized = tokenize(make_data(write_rows(ROWS), test=3), tokenizer, 1, tmp_path)
    parts = [part.group(index) for part in (tokenized.train, tokenized.test) for index in range(len(part))]
    assert sorted(part.margin for part in parts) == sorted(whole.margin_of.tolist())
    for part in parts:
        same = whole.group(int(part.margin * 2) - 1)
        assert all(np.array_equal(ours[0], theirs[0]) for ours, theirs in zip(part.rows, same.rows, strict=True))


def test_every_pair_that_is_left_out_is_counted(write_rows: Writer, tokenizer: Any, tmp_path: Path) -> None:
    bad = [
        {"prompt": "p", "chosen": "", "rejected": "x"},
        {"prompt": "p", "chosen": "x", "rejected": "x"},
        {"prompt": "p", "chosen": "one " * 99 + "a", "rejected": "one " * 99 + "b"},
        {"prompt": "word " * 200, "chosen": "x", "rejected": "y"},
        {"prompt": "p", "chosen": "one " * 99, "rejected": "y"},
    ]
    rows = write_rows(ROWS + [{**row, "by": 1} for row in bad])
    counts = tokenize(make_data(rows, max_length=64), tokenizer, 1, tmp_path).counts
    cut = "its two answers are the same once they are cut off"
    assert (counts.rows, counts.kept, counts.truncated) == (13, 9, 1)
    assert counts.unfit == {"an answer is empty": 1}
    assert counts.excused == {"its two answers are the same": 1, cut: 2}
    assert counts.dropped_untrained == 0
    dropped = tokenize(make_data(rows, max_length=64, overlong="drop"), tokenizer, 1, tmp_path).counts
    assert (dropped.kept, dropped.truncated) == (8, 0)
    assert dropped.excused["it is longer than max_length"] == 3


def test_no_pair_left_is_an_error(write_rows: Writer, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "x", "rejected": "x", "by": 1}] * 3
    with pytest.raises(UserError, match=r"none of the 3 rows is left to train on \(3 × its two answers are the same\)"):
        tokenize(make_data(write_rows(rows)), tokenizer, 1, tmp_path)


def test_the_preview_shows_both_answers(
    write_rows: Writer, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = [*ROWS, {"prompt": "p", "chosen": "x", "rejected": " x", "by": 1}]
    seen = preview.preview("pairs", make_data(write_rows(rows), test=2), tokenizer, seed=1, rows=1)
    text = preview.as_text(seen, preview.bracketed)
    assert "pairs: 8 of 9 rows, 2 held out" in text
    assert "left out   1 × its two answers are the same" in text
    chosen, rejected = text.split("  pair 1, chosen\n")[1].split("\n  pair 1, rejected\n")
    assert "⟦one " in chosen
    assert "⟦two " in rejected


SIGN: dict[str, Any] = {"margin_field": None, "preference_field": "sign"}


def test_preferences_without_a_sign_are_refused_by_all_rows(
    write_rows: Writer, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first row with 0 comes late, and after rows that an interrupted process has encoded."""
    monkeypatch.setattr(tokens, "BATCH", 4)
    monkeypatch.setattr(making, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})  # so that no process is started for so few rows
    rows = [{"prompt": f"{n}?", "chosen": "one", "rejected": "two", "sign": int(n != 60)} for n in range(61)]
    data = make_data(write_rows(rows), **SIGN)

    def stop_after(done: int) -> None:
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(data, tokenizer, 1, tmp_path / "cache", told=stop_after)
    with pytest.raises(UserError, match="field sign is 0 or 1 in all rows"):
        tokenize(data, tokenizer, 1, tmp_path / "cache")
    signed = make_data(write_rows([{**row, "sign": row["sign"] or -1} for row in rows]), **SIGN)
    assert tokenize(signed, tokenizer, 1, tmp_path / "cache").counts.kept == 61
    tied = make_data(write_rows([{**rows[0], "sign": -1}, *rows[1:]]), **SIGN)
    counts = tokenize(tied, tokenizer, 1, tmp_path / "cache").counts
    assert counts.excused == {"field sign is 0: no answer is the better one": 1}
