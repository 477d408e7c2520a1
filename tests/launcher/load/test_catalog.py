"""Finding the recipes that come with ftlaunch."""

from pathlib import Path

import pytest

from ftlaunch.errors import UserError
from ftlaunch.load import catalog
from ftlaunch.load.catalog import description, find_recipe, shipped_recipes


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in a repository with two recipes, and a working directory next to it."""
    package = tmp_path / "repository" / "launcher" / "ftlaunch"
    recipes = tmp_path / "repository" / "recipes"
    (recipes / "base").mkdir(parents=True)
    for name in ("qwen-lora.toml", "llama-full.toml", "base/small.toml", "notes.md"):
        (recipes / name).write_text(f"# {name}\n")
    package.mkdir(parents=True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(catalog, "PACKAGE", package)
    return package


def test_recipes_of_the_repository_are_listed_without_bases(package: Path) -> None:
    recipes = package.parent.parent / "recipes"
    assert shipped_recipes() == {
        "llama-full": recipes / "llama-full.toml",
        "qwen-lora": recipes / "qwen-lora.toml",
    }
    assert list(shipped_recipes()) == ["llama-full", "qwen-lora"]


def test_recipes_inside_the_installed_package_come_first(package: Path) -> None:
    (package / "recipes").mkdir()
    (package / "recipes" / "one.toml").touch()
    assert shipped_recipes() == {"one": package / "recipes" / "one.toml"}


@pytest.mark.parametrize("name", ["qwen-lora", "qwen-lora.toml"])
def test_a_shipped_recipe_is_found_by_name(package: Path, name: str) -> None:
    assert find_recipe(name) == package.parent.parent / "recipes" / "qwen-lora.toml"


@pytest.mark.usefixtures("package")
def test_a_path_that_exists_wins() -> None:
    Path("qwen-lora.toml").touch()
    assert find_recipe("qwen-lora.toml") == Path("qwen-lora.toml")
    assert find_recipe("qwen-lora") != Path("qwen-lora.toml")


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("qwen-lra", 'did you mean "qwen-lora"?'),
        ("recipes/llama_full.toml", 'did you mean "llama-full"?'),
        ("zzz", "correct the path"),
        ("work", "correct the path"),
    ],
)
def test_a_recipe_that_is_not_there_is_told_with_what_was_meant(name: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        find_recipe(name)
    assert name in caught.value.message
    assert remedy in caught.value.remedy
    assert "`ftlaunch recipes`" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# LoRA on one GPU\n# and more\nname = 1\n", "LoRA on one GPU"),
        ("\nname = 1 # no\n  # Full  \n", "Full"),
        ("name = 1\n", ""),
    ],
)
def test_the_description_is_the_first_comment(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    assert description(path) == expected
