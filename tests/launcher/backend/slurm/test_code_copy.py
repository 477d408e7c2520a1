"""What is edited while jobs wait changes nothing: packages and project lie in the run's folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from ftlaunch.backend.slurm import code_copy, paths
from ftlaunch.errors import UserError
from ftlaunch.load import load_recipe
from ftlaunch.plan.plan import Plan, make_plan
from ftlaunch.run import provenance, snapshot
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import RunDir

RECIPE = """\
name = "r"
model.path = "org/model"
[data.q]
path = "q.jsonl"
prompt = "{q}"
completion = "{a}"
template = "mine.jinja"
eval = "held.jsonl"
[[stage]]
kind = "sft"
data = "q"
eval_metrics = ["./mine.py"]
[[stage]]
kind = "ppo"
data = "q"
reward_function = "rewards/length.py:score"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout with a recipe and what it names; of these only the recipe is committed."""
    folder = tmp_path / "project"
    (folder / "rewards").mkdir(parents=True)
    git = ("git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b")
    (folder / "r.toml").write_text(RECIPE)
    for command in (("init", "-q"), ("add", "r.toml"), ("commit", "-qm", "one")):
        subprocess.run([*git, *command], check=True)
    files = {"q.jsonl": '{"q": "1", "a": "2"}\n', "mine.jinja": "{{ messages }}", "rewards/length.py": "def score(): 1"}
    files |= {"held.jsonl": '{"q": "3", "a": "4"}\n', "mine.py": "a metric"}
    files |= {"ignored.txt": "x", ".gitignore": "ignored.txt", ".env": "A=1", "large.bin": "x" * (5 << 20)}
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def taken(project: Path, tmp_path: Path) -> tuple[RunDir, Plan]:
    recipe = load_recipe(project / "r.toml", []).recipe
    run = RunDir(tmp_path / "run")
    run.path.mkdir(exist_ok=True)
    code_copy.take(run, project / "r.toml", recipe)
    write_json(run.provenance, provenance.collect(recipe, project / "r.toml"))
    return run, make_plan(recipe, run.path)


def test_a_step_is_led_to_copies_of_what_it_names(project: Path, tmp_path: Path) -> None:
    run, plan = taken(project, tmp_path)
    (project / "rewards/length.py").write_text("edited meanwhile")
    sft, ppo = (snapshot.redirect(planned.spec, run) for planned in plan.stages)
    assert sft.data["q"].path == str(run.path / "code/q.jsonl")
    assert sft.data["q"].eval == str(run.path / "code/held.jsonl")
    assert msgspec.to_builtins(sft.stage)["eval_metrics"] == [str(run.path / "code/mine.py")]
    assert Path(sft.data["q"].template).read_text() == "{{ messages }}"
    place, _, name = msgspec.to_builtins(ppo.stage)["reward_function"].rpartition(":")
    assert (Path(place).read_text(), name) == ("def score(): 1", "score")


def test_tracked_and_uncommitted_files_are_copied_and_no_others(project: Path, tmp_path: Path) -> None:
    run, _ = taken(project, tmp_path)
    copied = {str(path.relative_to(run.code)) for path in run.code.rglob("*") if path.is_file()}
    assert copied == {"r.toml", "q.jsonl", "held.jsonl", "mine.jinja", "mine.py", "rewards/length.py"}


def test_without_a_checkout_what_the_recipe_names_is_copied(project: Path, tmp_path: Path) -> None:
    bare = project.rename(tmp_path / "bare")
    subprocess.run(["rm", "-r", str(bare / ".git")], check=True)
    run, plan = taken(bare, tmp_path)
    stage = msgspec.to_builtins(snapshot.redirect(plan.stages[1].spec, run).stage)
    assert stage["reward_function"] == f"{run.code}/.named/1/length.py:score"
    sft = msgspec.to_builtins(snapshot.redirect(plan.stages[0].spec, run).stage)
    assert sft["eval_metrics"] == [f"{run.code}/.named/0/mine.py"]


def test_a_run_that_is_submitted_again_takes_what_has_been_edited(project: Path, tmp_path: Path) -> None:
    run, plan = taken(project, tmp_path)
    (project / "rewards/length.py").write_text("mended")
    code_copy.retake(run, plan.recipe)
    assert (run.code / "rewards/length.py").read_text() == "mended"
    project.rename(tmp_path / "gone")
    shutil.rmtree(paths.packages(run))
    code_copy.retake(run, plan.recipe)
    assert (run.code / "rewards/length.py").read_text() == "mended"
    assert (paths.packages(run) / "ftlaunch/__init__.py").exists()


def test_packages_are_imported_from_the_copy(project: Path, tmp_path: Path) -> None:
    run, _ = taken(project, tmp_path)
    program = "import ftlaunch, importlib.util as u; print(ftlaunch.__file__, u.find_spec('fttrain').origin)"
    variables = os.environ | {"PYTHONPATH": str(paths.packages(run))}
    said = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True)
    assert said.stdout.split() == [str(paths.packages(run) / f"{name}/__init__.py") for name in code_copy.PACKAGES]


def test_a_project_too_large_is_refused(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_copy, "ALL_BYTES", 100)
    with pytest.raises(UserError, match="in 6 files that git does not ignore"):
        taken(project, tmp_path)
