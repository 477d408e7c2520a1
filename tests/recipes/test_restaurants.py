"""The data sets that are shipped are what their generators write."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "recipes" / "data"
SHIPPED = FOLDER / "restaurants.jsonl"


@pytest.mark.parametrize("name", ["restaurants", "pairs"])
def test_the_generator_writes_the_shipped_file(name: str, tmp_path: Path) -> None:
    again = tmp_path / "again.jsonl"
    subprocess.run([sys.executable, FOLDER / f"make_{name}.py", again], check=True)
    assert again.read_bytes() == (FOLDER / f"{name}.jsonl").read_bytes()


def test_rows_are_distinct_short_and_in_style() -> None:
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({row["mr"] for row in rows}) == len(rows) == 600
    assert max(map(len, lines)) < 500
    for row in rows:
        facts = dict(re.findall(r"([a-z ]+)\[([^]]+)\]", row["mr"].replace(", ", ",")))
        assert 3 <= len(facts) <= 7
        assert row["text"].startswith(facts["name"])
        told = [facts[key] for key in ("food", "area", "near", "price", "rating") if key in facts]
        places = [row["text"].find(fact) for fact in told]
        assert -1 not in places
        assert places == sorted(places)
        assert row["text"].endswith("Book ahead.") == (facts.get("rating", "")[:1] in ("8", "9"))


def test_the_better_answer_is_the_house_s_and_the_worse_one_boasts() -> None:
    rows = [json.loads(line) for line in (FOLDER / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({row["mr"] for row in rows}) == len(rows) == 320
    assert all("!" not in row["chosen"] and row["rejected"].count("!") >= 2 for row in rows)
