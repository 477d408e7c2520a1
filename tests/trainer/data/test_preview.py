"""What training will see, as it is printed."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftlaunch.recipe.data import Data
from ftlaunch.recipe.model import Model
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.recipe.stages import Ppo, Sft
from ftlaunch.tools import PreviewOptions
from fttrain.tools import preview
from fttrain.tools.output import answer

ROWS = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(20)]
FIELDS: dict[str, Any] = {"prompt": "{question}", "completion": "{answer}", "template": "chatml"}
Show = Callable[..., tuple[int, str, str]]


@pytest.fixture
def show(
    tmp_path: Path,
    write_rows: Callable[[Any], str],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Show:
    """Previews a recipe of two tables and gives exit code, stdout and stderr."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(preview, "load_tokenizer", lambda *_: tokenizer)

    def run(
        shown: int = 2, *, rows: Any = ROWS, json: bool = False, stage: Any = None, **fields: Any
    ) -> tuple[int, str, str]:
        data = Data(path=write_rows(rows), **FIELDS | fields)
        recipe = Recipe(
            name="x",
            model=Model(path="tiny"),
            stage=[Sft(data="facts"), Sft(data=["facts"])] if stage is None else [stage],
            data={"facts": data, "unused": Data(path="no/such.csv", format="text")},
        )
        code = answer(preview.main, PreviewOptions(recipe=recipe, rows=shown, json=json))
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_counts_and_samples(show: Show) -> None:
    code, out, _ = show(2, test=4)
    assert code == 0
    assert out.count("facts: 20 of 20 rows, 4 held out") == 1
    assert out.count("  row ") == 2
    assert len(re.findall(r"\?<\|im_end\|>\n<\|im_start\|>assistant\n⟦It is \d+\.<\|im_end\|>\n⟧", out)) == 2
    assert "truncated  0 rows" in out


def test_of_many_rows_the_first_are_looked_at(show: Show, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(preview, "SAMPLED_ROWS", 12)
    code, out, _ = show(1, test=10)
    assert code == 0
    assert "facts: 12 of 12 rows (the first ones: a run tokenizes all), 6 held out" in out
    assert not list((tmp_path / "cache").rglob("ids")), "a sample is not kept as if it were the whole"
    monkeypatch.setattr(preview, "SAMPLED_ROWS", 20)
    assert "facts: 20 of 20 rows, 10 held out" in show(test=10)[1]


def test_green_on_a_terminal(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    _, out, _ = show()
    assert "assistant\n\033[30;42mIt is 0.<|im_end|>\033[0m\n" in out
    assert "⟦" not in out


def test_json_holds_the_same(show: Show) -> None:
    _, out, _ = show(1, json=True, max_length=1024)
    (facts,) = json.loads(out)
    assert (facts["name"], facts["rows"], facts["kept"], facts["held_out"]) == ("facts", 20, 20, 0)
    assert facts["longest"] >= facts["mean_length"] > 0
    assert facts["tokens"] == pytest.approx(20 * facts["mean_length"])
    (sample,) = facts["samples"]
    assert [part["trained"] for part in sample] == [False, True]
    assert sample[1]["text"] == "It is 0.<|im_end|>\n"


def test_a_stream_is_only_looked_into(show: Show) -> None:
    _, out, _ = show(rows=ROWS * 30, streaming=True)
    assert "facts: 200 of 200 rows (the first 200 of a stream), 0 held out" in out


def test_what_is_wrong_goes_to_stderr(show: Show) -> None:
    code, out, err = show(rows=[{"question": "Why?"}])
    assert (code, out) == (2, "")
    assert "rows.jsonl:1: field answer is missing" in err
    assert "→ the row has the fields question" in err


def test_prompts_without_completions_are_shown_with_nothing_trained(show: Show):
    code, out, _ = show(
        1,
        stage=Ppo(data="facts"),
        completion=None,
        max_length=44,
        rows=[*ROWS, {"question": "Why? " * 50}],
        test=3,
    )
    assert code == 0
    assert "20 of 21 rows, 3 held out" in out
    assert "left out   1 × its prompt is longer than max_length" in out
    assert "What is 0?" in out
    assert "⟦" not in out


def test_answers_whose_white_space_the_template_changes_are_counted(show: Show) -> None:
    indented = [
        {**row, "answer": f"    {row['answer']}"} if number in (2, 7) else row for number, row in enumerate(ROWS)
    ]
    code, out, _ = show(rows=indented, template="llama2")
    assert code == 0
    assert "2 rows with answers whose white space the chat template changes; first " in out
    assert re.search(r"first .*rows\.jsonl:3$", out, re.MULTILINE)
