"""Token sets: what is kept, counted, split, cached and refused."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from tests.trainer.in_process import encode_row

from ftlaunch.errors import UserError
from ftlaunch.recipe.data import Data
from ftlaunch.run.files import temporary_path
from ftlaunch.run.records import Counts
from fttrain.data import feed, tokens
from fttrain.data.chat import Encoded, Encoder
from fttrain.data.making import Making, block_of
from fttrain.data.token_set import TokenSet
from fttrain.data.tokens import cache_root, stream, stream_test, tokenize

ROWS = [{"question": f"What is {n}?", "answer": f"It is {n}{' indeed' * (n % 3)}."} for n in range(40)]
ASKED = {"prompt": "{question}", "completion": "{answer}", "template": "chatml"}

Writer = Callable[[Any], str]


def make_data(path: str, **fields: Any) -> Data:
    return Data(**{"path": path, **ASKED, **fields})


def texts(rows: TokenSet, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(rows.row(index)[0].tolist()) for index in range(len(rows))]


def chatml(row: dict[str, str]) -> str:
    question, answer = row["question"], row["answer"]
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def encoded_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of rows of each call that encodes any."""
    calls: list[int] = []
    encode_many = Encoder.encode_many

    def counting(self: Encoder, rows: Any) -> Any:
        calls.append(len(rows))
        return encode_many(self, rows)

    monkeypatch.setattr(Encoder, "encode_many", counting)
    return calls


def test_all_rows_are_kept_in_order_with_their_marks(write_rows: Writer, tokenizer: Any, cache: Path) -> None:
    data = make_data(write_rows(ROWS))
    tokenized = tokenize(data, tokenizer, 1, cache)
    assert texts(tokenized.train, tokenizer) == [chatml(row) for row in ROWS]
    assert len(tokenized.test) == 0
    encoder = Encoder(tokenizer, data)
    for index, row in enumerate(ROWS):
        (encoded,) = encode_row(encoder, row)
        ids, trained = tokenized.train.row(index)
        assert (ids.tolist(), trained.tolist()) == (encoded.ids_T, encoded.trained_T)
        assert tokenized.train.lengths[index] == len(ids)
        assert tokenized.train.supervised[index] == np.count_nonzero(trained[1:])
    assert (ids.dtype, trained.dtype) == (np.int32, np.bool_)
    count, trained = int(tokenized.train.lengths.sum()), int(tokenized.train.supervised.sum())
    assert tokenized.counts == Counts(rows=40, kept=40, tokens=count, trained=trained, respaced=0)


def test_the_first_token_is_trained_but_not_counted(write_rows: Writer, tokenizer: Any, cache: Path) -> None:
    data = make_data(write_rows([{"text": "Blue"}]), format="text")
    tokenized = tokenize(data, tokenizer, 1, cache)
    ids, trained = tokenized.train.row(0)
    assert trained.all()
    assert tokenized.counts.trained == tokenized.train.supervised[0] == len(ids) - 1


@pytest.mark.parametrize(("test", "size"), [(0, 0), (5, 5), (0.1, 4), (0.001, 1)])
def test_the_split(test: float, size: int, write_rows: Writer, tokenizer: Any, cache: Path) -> None:
    data = make_data(write_rows(ROWS), test=test)
    parts = [tokenize(data, tokenizer, seed, cache) for seed in (1, 1, 2)]
    train, held_out = texts(parts[0].train, tokenizer), texts(parts[0].test, tokenizer)
    expected = [chatml(row) for row in ROWS]
    assert len(held_out) == size
    assert train == [text for text in expected if text not in held_out]
    assert sorted(train + held_out) == sorted(expected)
    assert (train, held_out) == (texts(parts[1].train, tokenizer), texts(parts[1].test, tokenizer))
    assert size < 4 or held_out != texts(parts[2].test, tokenizer)


def test_prompts_are_held_out_with_all_their_rows(
    write_rows: Writer, tokenizer: Any, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"question": f"What is {n % 8}?", "answer": f"It is {n}."} for n in range(40)]
    by_row = tokenize(make_data(write_rows(rows), test=10), tokenizer, 1, cache)
    feed.report_shared("facts", by_row)
    assert "data.facts: 10 of the 10 rows held out have a prompt that is trained on, too" in caplog.text
    caplog.clear()
    by_prompt = tokenize(make_data(write_rows(rows), test=8, test_by="prompt"), tokenizer, 1, cache)
    feed.report_shared("facts", by_prompt)
    assert not caplog.text
    asked = [
        {text.partition("<|im_end|>")[0] for text in texts(part, tokenizer)}
        for part in (by_prompt.train, by_prompt.test)
    ]
    assert (len(by_prompt.test), len(asked[1])) == (10, 2)  # five rows of each of two prompts
    assert not asked[0] & asked[1]
    assert sorted(texts(by_prompt.train, tokenizer) + texts(by_prompt.test, tokenizer)) == sorted(map(chatml, rows))
    with pytest.raises(UserError, match="those of a prompt or document stay together"):
        tokenize(
            make_data(write_rows([{**row, "question": "Why?"} for row in rows]), test=8, test_by="prompt"),
            tokenizer,
            1,
            cache,
        )


def test_rows_for_evaluation_of_their_own(write_rows: Writer, tokenizer: Any, cache: Path, tmp_path: Path) -> None:
    other = [{"question": "Who?", "answer": "Me."}, {"question": "When?", "answer": "Now."}]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    data = make_data(write_rows(ROWS), eval=str(tmp_path / "eval.jsonl"), limit=5)
    tokenized = tokenize(data, tokenizer, 1, cache)
    assert texts(tokenized.train, tokenizer) == [chatml(row) for row in ROWS[:5]]
    assert texts(tokenized.test, tokenizer) == [chatml(row) for row in other]
    assert texts(stream_test(data, tokenizer), tokenizer) == [chatml(row) for row in other]


def test_a_split_for_evaluation(tokenizer: Any, cache: Path) -> None:
    shards = Path(__file__).parents[2] / "shapes" / "shards_flat"
    data = Data(path=str(shards), format="alpaca", template="chatml", eval="validation")
    tokenized = tokenize(data, tokenizer, 1, cache)
    assert all("[train]" in text for text in texts(tokenized.train, tokenizer))
    assert all("[validation]" in text for text in texts(tokenized.test, tokenizer))
    assert (len(tokenized.train), len(tokenized.test) > 0) == (20, True)


def test_what_is_cut_and_left_out_is_counted(write_rows: Writer, tokenizer: Any, cache: Path) -> None:
    short, long, endless = (
        {"question": "Q", "answer": "A"},
        {"question": "Q", "answer": "Blue " * 20},
        {"question": "Blue " * 80, "answer": "A"},
    )
    path = write_rows([short, long, endless, short])
    cut = tokenize(make_data(path, max_length=30), tokenizer, 1, cache)
    assert len(cut.train) == 3
    assert cut.train.lengths.max() == 30
    assert (cut.counts.rows, cut.counts.kept, cut.counts.truncated) == (4, 3, 2)
    whole = tokenize(make_data(path), tokenizer, 1, cache)
    assert cut.counts.lost == sum(max(0, length - 30) for length in whole.train.lengths)
    assert (cut.counts.excused, cut.counts.dropped_untrained) == ({}, 1)
    dropped = tokenize(make_data(path, max_length=30, overlong="drop"), tokenizer, 1, cache)
    assert texts(dropped.train, tokenizer) == [chatml(short)] * 2
    assert (dropped.counts.truncated, dropped.counts.excused) == (0, {"it is longer than max_length": 2})


def test_a_second_call_tokenizes_nothing(
    write_rows: Writer, tokenizer: Any, cache: Path, encoded_rows: list[int]
) -> None:
    path = write_rows(ROWS)
    first = tokenize(make_data(path), tokenizer, 1, cache)
    assert encoded_rows == [40]
    for seed, fields in [(1, {}), (2, {"test": 5}), (1, {"weight": 2.0})]:
        again = tokenize(make_data(path, **fields), tokenizer, seed, cache)
        assert again.counts == first.counts
    assert encoded_rows == [40]
    assert isinstance(first.train.ids.base, np.memmap)
    assert not first.train.ids.flags.writeable


def test_the_key_is_not_moved_by_earlier_calls_of_the_tokenizer(write_rows: Writer, make_tokenizer: Any) -> None:
    data, tokenizer = make_data(write_rows(ROWS)), make_tokenizer()
    encoder = Encoder(tokenizer, data)
    before = tokens._key(data, tokenizer, encoder)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
    assert tokens._key(data, tokenizer, encoder) == before


@pytest.mark.parametrize(
    "fields",
    [{"max_length": 30}, {"train_on": "all"}, {"prompt": "{question}!"}, {"template": "llama2"}, {"limit": 39}],
)
def test_other_data_is_tokenized_anew(
    fields: dict[str, Any], write_rows: Writer, tokenizer: Any, cache: Path, encoded_rows: list[int]
) -> None:
    path = write_rows(ROWS)
    tokenize(make_data(path), tokenizer, 1, cache)
    tokenize(make_data(path, **fields), tokenizer, 1, cache)
    assert len(encoded_rows) == 2


def test_other_rows_or_tokenizers_are_tokenized_anew(
    write_rows: Writer, make_tokenizer: Any, cache: Path, encoded_rows: list[int]
) -> None:
    own = {"template": "tokenizer"}
    tokenize(make_data(write_rows(ROWS), **own), make_tokenizer(), 1, cache)
    tokenize(make_data(write_rows(ROWS[:-1]), **own), make_tokenizer(), 1, cache)
    assert encoded_rows == [40, 39]
    for change in ({"adds_bos": True}, {"chat_template": make_tokenizer().chat_template.replace("tiny", "small")}):
        tokenize(make_data(write_rows(ROWS), **own), make_tokenizer(**change), 1, cache)
    assert encoded_rows == [40, 39, 40, 40]


def cached_folder(cache: Path) -> Path:
    (folder,) = cache.iterdir()
    return folder


@pytest.mark.parametrize("broken", ["ids", "trained", "meta.json", "gone"])
def test_a_broken_cache_is_made_again(
    broken: str,
    write_rows: Writer,
    tokenizer: Any,
    cache: Path,
    encoded_rows: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = make_data(write_rows(ROWS))
    before = texts(tokenize(data, tokenizer, 1, cache).train, tokenizer)
    if broken == "gone":
        (cached_folder(cache) / "lengths").unlink()
    else:
        content = (cached_folder(cache) / broken).read_bytes()
        (cached_folder(cache) / broken).write_bytes(content[:-4])
    folder = cached_folder(cache)
    for _ in range(2):
        assert texts(tokenize(data, tokenizer, 1, cache).train, tokenizer) == before
    assert encoded_rows == [40, 40]
    assert f"the cached tokens in {folder} are not read" in caplog.text


def test_nodes_that_make_the_same_set_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Each node tokenizes, and they may share a home: whoever comes second must leave what is there alone."""
    rows, together = [Encoded([1, 2, 3], [False, True, True]), Encoded([4, 5], [True, True])], Barrier(4)

    def make(number: int) -> list[int]:
        making = Making(tmp_path / str(number), temporary_path(tmp_path / str(number)))
        making.add(block_of(rows[:1]))
        making.keep(dict, now=True)
        making.add(block_of(rows[1:]))
        together.wait()
        return making.publish(Counts(rows=2))[0].lengths.tolist()

    with ThreadPoolExecutor(4) as pool:
        for number in range(100):
            assert list(pool.map(make, [number] * 4)) == [[3, 2]] * 4
    assert len(list(tmp_path.iterdir())) == 100


def test_the_cache_is_private_and_whole(write_rows: Writer, tokenizer: Any, cache: Path) -> None:
    data = make_data(write_rows(ROWS))
    tokenize(data, tokenizer, 1, cache)
    assert cached_folder(cache).stat().st_mode & 0o777 == 0o700
    assert cache.stat().st_mode & 0o777 == 0o700
    bad = make_data(write_rows([*ROWS, {"question": "Why?"}]), unfit="stop")
    with pytest.raises(UserError, match=r"rows\.jsonl:41: field answer is missing"):
        tokenize(bad, tokenizer, 1, cache)
    assert cached_folder(cache).is_dir(), "nothing else is left"


def test_unfit_rows_are_left_out_up_to_a_share(write_rows: Writer, tokenizer: Any, cache: Path) -> None:
    path = write_rows([*ROWS, {"question": "Why?"}, {"question": "Who?", "answer": None}])
    counts = tokenize(make_data(path), tokenizer, 1, cache).counts
    assert (counts.rows, counts.kept) == (42, 40)
    assert counts.unfit == {"field answer is missing": 1, "field answer is null": 1}
    assert counts.examples == [f"{path}:41: field answer is missing", f"{path}:42: field answer is null"]
    for fields in ({"unfit_share": 0.04}, {"unfit": "stop"}):
        with pytest.raises(UserError, match=r"rows\.jsonl:41: field answer is missing \(in 1 of 42 rows; 2 in all\)"):
            tokenize(make_data(path, **fields), tokenizer, 1, cache / "other")


def test_long_texts_are_split_and_nothing_is_lost(write_rows: Writer, make_tokenizer: Any, cache: Path) -> None:
    texts = ["Blue is the sky. " * 20, "", "Two."]
    for adds_bos in (False, True):
        tokenizer = make_tokenizer(adds_bos=adds_bos, eos_token="</s>")
        data = make_data(write_rows([{"text": text} for text in texts]), max_length=20, format="text")
        rows = tokenize(data, tokenizer, 1, cache)
        assert isinstance(rows.train, TokenSet)
        bos = [tokenizer.bos_token_id] if adds_bos else []
        whole = [
            token
            for text in (texts[0], texts[2])
            for token in tokenizer(text + "</s>", add_special_tokens=False).input_ids
        ]
        parts = [rows.train.row(index)[0].tolist() for index in range(len(rows.train))]
        assert all(part[: len(bos)] == bos and len(part) <= 20 for part in parts)
        assert [token for part in parts for token in part[len(bos) :]] == whole
        assert (rows.counts.rows, rows.counts.split, rows.counts.lost) == (3, 1, 0)
        assert rows.counts.excused == {"field text is blank": 1}


def test_the_parts_of_a_document_are_held_out_together(write_rows: Writer, tokenizer: Any, cache: Path) -> None:
    rows = [{"text": f"{word} " * 30} for word in ("Blue", "sky", "Paris", "France", "Two")] + [{"text": "brief"}]
    data = make_data(write_rows(rows), max_length=20, format="text", test=3)
    made = tokenize(data, tokenizer, 1, cache)
    assert made.counts.split == 5
    train, test = ({text.split()[0] for text in texts(part, tokenizer)} for part in (made.train, made.test))
    words = {row["text"].split()[0] for row in rows}
    held = {word for word in words if any(word in text for text in texts(made.test, tokenizer))}
    assert len(made.test) >= 3
    assert not any(word in text for word in held for text in texts(made.train, tokenizer))
    assert train
    assert test


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "ftlaunch" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "ftlaunch" / "tokens"


NO_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
OTHER_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>\n' }}{% endfor %}"


@pytest.mark.parametrize(
    ("rows", "fields", "said"),
    [
        (ROWS, {"max_length": 8}, "none of the 40 rows is left to train on (40 × no token to train)"),
        (ROWS, {"max_length": 8, "overlong": "drop"}, "(40 × it is longer than max_length)"),
        (ROWS, {"test": 40}, "takes all of the 40 rows"),
        (ROWS[:1], {"test": 0.5}, "takes all of the 1 rows"),
        (ROWS, {"template": "tokenizer"}, "the end of an answer is never trained"),
        ([], {}, "the file has no rows"),
    ],
)
def test_refusals(
    rows: Any, fields: dict[str, Any], said: str, write_rows: Writer, make_tokenizer: Any, cache: Path
) -> None:
    with pytest.raises(UserError) as caught:
        tokenize(make_data(write_rows(rows), **fields), make_tokenizer(chat_template=NO_END), 1, cache)
    assert said in caught.value.message
    assert caught.value.remedy


def test_any_special_token_may_end_a_turn(write_rows: Writer, make_tokenizer: Any, cache: Path) -> None:
    data = make_data(write_rows(ROWS), template="tokenizer")
    assert len(tokenize(data, make_tokenizer(chat_template=OTHER_END), 1, cache).train) == 40


def test_rows_that_are_all_cut_need_no_end(write_rows: Writer, tokenizer: Any, cache: Path) -> None:
    data = make_data(write_rows([{"text": "Blue " * 40}]), format="text", max_length=20, overlong="truncate")
    assert tokenize(data, tokenizer, 1, cache).counts.truncated == 1


def test_a_stream_gives_what_is_not_held_out(write_rows: Writer, tokenizer: Any) -> None:
    data = make_data(write_rows(ROWS), test=5, streaming=True)
    held_out = texts(stream_test(data, tokenizer), tokenizer)
    streamed = [tokenizer.decode(row.ids_T) for row in stream(data, tokenizer, 1)]
    assert held_out == [chatml(row) for row in ROWS[:5]]
    assert sorted(streamed) == sorted(chatml(row) for row in ROWS[5:])
    assert streamed == [tokenizer.decode(row.ids_T) for row in stream(data, tokenizer, 1)]
    assert streamed != [tokenizer.decode(row.ids_T) for row in stream(data, tokenizer, 2)]


def test_a_stream_is_read_as_it_goes(write_rows: Writer, tokenizer: Any, encoded_rows: list[int]) -> None:
    rows = stream(make_data(write_rows(ROWS * 50), streaming=True), tokenizer, 1)
    for _ in range(10):
        next(rows)
    assert sum(encoded_rows) == 64


def test_a_stream_is_judged(write_rows: Writer, make_tokenizer: Any) -> None:
    path = write_rows(ROWS * 50)
    with pytest.raises(UserError, match="none of the 1000 rows is left"):
        list(stream(make_data(path, streaming=True, max_length=8), make_tokenizer(), 1))
    own = make_data(path, streaming=True, template="tokenizer", limit=70)
    with pytest.raises(UserError, match="the end of an answer is never trained"):
        list(stream(own, make_tokenizer(chat_template=NO_END), 1))


def test_answers_that_lose_white_space_are_told_in_the_log(
    write_rows: Writer, tokenizer: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tokens, "BATCH", 2)
    indented = [{**row, "answer": "    return 1"} if number > 2 else row for number, row in enumerate(ROWS)]
    data = make_data(write_rows(indented), template="llama2")
    for _ in range(2):  # made, and then from the cache
        counts = tokenize(data, tokenizer, 1, cache).counts
        assert (counts.respaced, counts.first_respaced) == (len(ROWS) - 3, f"{data.path}:4")
    feed.report("facts", counts)
    assert f"white space, such as indentation, in answers of {len(ROWS) - 3} rows; first {data.path}:4" in caplog.text
