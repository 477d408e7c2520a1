"""What the verbs make of a model's name: a hub id, or a path that is absolute from then on."""

import json
import os
import tomllib
from pathlib import Path

import pytest
from tests.launcher.conftest import Call
from tests.launcher.scripted_runs import write_run

from ftlaunch.errors import BAD_INPUT, DONE
from ftlaunch.processes import trainer
from ftlaunch.tools import EvaluateOptions, ToolOptions

RECIPE = """\
name = "small"
model.path = "owner/model"
data.q = { path = "owner/rows", format = "text" }
stage = [{ kind = "sft", data = "q" }]
"""
VERBS = {
    "chat": ("chat", "{}", "--prompt", "hi"),
    "serve": ("serve", "{}"),
    "serve --compare": ("serve", "owner/other", "--compare", "{}"),
    "eval": ("eval", "small.toml", "{}"),
    "superweights": ("superweights", "{}"),
    "quantize": ("quantize", "{}", "out"),
    "preview": ("preview", "small.toml", "--set", "model.path={}"),
}
FOLDERS = {"merge": ("merge", "{}", "out"), "push": ("push", "{}", "me/model", "--dry-run")}


@pytest.fixture(autouse=True)
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[ToolOptions]:
    """What the trainer's tools are called with."""
    found: list[ToolOptions] = []

    def call(options: ToolOptions) -> int:
        found.append(options)
        return DONE

    monkeypatch.setattr(trainer, "call", call)
    monkeypatch.chdir(tmp_path)
    Path("small.toml").write_text(RECIPE)
    return found


def name_in(options: ToolOptions, verb: str) -> str:
    """The name that a tool is given."""
    if verb == "preview":
        return options.recipe.model.path  # pyright: ignore[reportAttributeAccessIssue]
    for key in ("compare",) if "--compare" in verb else ("model", "models", "source", "folder"):
        if named := getattr(options, key, None):
            return named if isinstance(named, str) else named[0]
    raise AssertionError(options)


def line(verb: str, name: str) -> list[str]:
    return [word.format(name) for word in (VERBS | FOLDERS)[verb]]


@pytest.mark.parametrize("verb", VERBS)
def test_a_hub_id_stays_one_where_a_folder_has_its_name(verb: str, call: Call, asked: list[ToolOptions]) -> None:
    assert call(*line(verb, "owner/model"))[0] == DONE
    Path("owner/model").mkdir(parents=True)
    code, _, told = call(*line(verb, "owner/model"))
    assert code == DONE
    assert "owner/model is a hub id; what is here has to be written ./owner/model" in told
    assert [name_in(options, verb) for options in asked] == ["owner/model"] * 2


@pytest.mark.parametrize("verb", VERBS)
def test_a_name_of_one_part_that_something_here_has_is_refused(verb: str, call: Call, asked: list[ToolOptions]) -> None:
    assert call(*line(verb, "gpt2"))[0] == DONE
    Path("gpt2").mkdir()
    code, _, told = call(*line(verb, "gpt2"))
    assert code == BAD_INPUT
    assert "write ./gpt2 for what is here, or the hub id with its owner: OWNER/gpt2" in told
    assert [name_in(options, verb) for options in asked] == ["gpt2"]


@pytest.mark.parametrize("verb", [*VERBS, *FOLDERS])
@pytest.mark.parametrize("path", ["./gpt2", "./owner/model", "a/b/model", "../{here}/gpt2"])
def test_a_path_is_absolute_from_then_on(verb: str, path: str, call: Call, asked: list[ToolOptions]) -> None:
    path = path.format(here=Path.cwd().name)
    Path(path).mkdir(parents=True)
    assert call(*line(verb, path))[0] == DONE
    assert os.path.normpath(name_in(asked[0], verb)) == os.path.normpath(Path.cwd() / path)


@pytest.mark.parametrize("verb", FOLDERS)
def test_where_only_folders_can_be_named_a_bare_name_is_one(verb: str, call: Call, asked: list[ToolOptions]) -> None:
    assert call(*line(verb, "owner/model"))[0] == DONE
    assert name_in(asked[0], verb) == str(Path.cwd() / "owner/model")


def test_the_base_of_a_run_is_what_its_recipe_names_whatever_runs_and_folders_are_here(
    call: Call, asked: list[ToolOptions]
) -> None:
    run = write_run(Path("runs/mine").absolute(), "train")
    run.resolved.write_text(json.dumps(tomllib.loads(RECIPE)))
    (run.path / "01-sft/artifact").mkdir()
    (run.path / "01-sft/result.json").write_text("{}")
    for name in ("owner/model", "runs/owner/model"):
        Path(name).mkdir(parents=True)
        Path(name, "plan.json").touch()
    assert call("eval", "mine")[0] == DONE
    (options,) = asked
    assert isinstance(options, EvaluateOptions)
    assert options.models == ["owner/model", str(run.path / "01-sft/artifact")]
