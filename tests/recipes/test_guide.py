"""What the guides show is right: their tables are read and judged as those of a recipe are."""

import re
from pathlib import Path
from typing import get_args

import pytest

from ftlaunch.errors import RecipeError
from ftlaunch.load import load_recipe
from ftlaunch.recipe.adapter import Adapter
from ftlaunch.recipe.noise import Noise
from ftlaunch.rules import find_problems

PAGES = sorted((Path(__file__).parents[2] / "recipes" / "guide").glob("*.md"))
SHOWN = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```toml\n(\[data\.[^`]*)```", page.read_text()), start=1)
]
AROUND = 'name = "shown"\n[model]\npath = "owner/model"\n'
STAGE = '[[stage]]\nkind = "ppo"\nreward_function = "gsm8k"\nsteps = 4\n'


@pytest.mark.parametrize("block", SHOWN)
def test_a_table_that_a_guide_shows(block: str, tmp_path: Path):
    names = re.findall(r"\[data\.([^\]]+)\]", block)
    for path in re.findall(r'^path = "([^"]+)"', block, re.MULTILINE):
        if path.count("/") == 0:
            (tmp_path / path).write_text("{}\n")
        elif path.startswith("./"):
            (tmp_path / path).mkdir()
    recipe = tmp_path / "shown.toml"
    recipe.write_text(f"{AROUND}{block}\n{STAGE}data = {names!r}\n".replace("'", '"'))
    try:
        problems = find_problems(load_recipe(recipe))
    except RecipeError as error:
        problems = error.problems
    assert [str(problem) for problem in problems] == []


@pytest.mark.parametrize(("page", "kinds"), [("adapters", Adapter), ("noise", Noise)])
def test_a_guide_names_each_kind(page: str, kinds: object):
    tags = {str(kind.__struct_config__.tag) for kind in get_args(kinds)}
    text = (PAGES[0].parent / f"{page}.md").read_text()
    assert [tag for tag in sorted(tags - {"none"}) if f"`{tag}`" not in text and f'"{tag}"' not in text] == []
