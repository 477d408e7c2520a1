"""Which cluster a recipe for several nodes is for, where none is named."""

from pathlib import Path

import msgspec
import pytest

from ftlaunch.backend.driving import Driven
from ftlaunch.backend.slurm.backend import Slurm
from ftlaunch.cli.profile import for_recipe
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import RecipeError, UserError
from ftlaunch.load import Loaded
from ftlaunch.recipe.model import Model
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.recipe.stages import Parallel, Sft


def recipe(nodes: int) -> Loaded:
    parallel = Parallel(strategy="ddp", nodes=nodes)
    made = Recipe(name="r", model=Model(path="owner/model"), stage=[Sft(data="d")], parallel=parallel)
    return Loaded(made, Path("r.toml"), "", lambda _: "r.toml")


def chosen(loaded: Loaded, name: str | None, site: list[str] | None) -> Cluster | None:
    """The profile of the backend; None where it is this machine."""
    backend = for_recipe(loaded, name, site)
    assert isinstance(backend, Driven | Slurm)
    return None if isinstance(backend, Driven) else backend.cluster


@pytest.fixture(autouse=True)
def login_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user, on a machine with sbatch."""
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("FTLAUNCH_CLUSTER", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    profiles = tmp_path / "slurm/profiles"
    profiles.mkdir(parents=True)
    (profiles / "mine.toml").write_text('partition = "mine"\n')
    return profiles


def test_slurms_own_defaults_count_where_there_is_no_profile(capsys: pytest.CaptureFixture[str]):
    assert chosen(recipe(2), None, None) == Cluster()
    assert "SLURM's own defaults" in capsys.readouterr().err
    assert chosen(recipe(2), None, ["signal_lead=300"]) == Cluster(signal_lead=300)


def test_where_there_is_no_profile_an_empty_one_will_do(tmp_path: Path, login_node: Path):
    (login_node / "mine.toml").unlink()
    with pytest.raises(UserError, match="none is named") as told:
        chosen(recipe(1), None, ["signal_lead=300"])
    named = told.value.remedy.split("an empty ")[1].split(" is one: --cluster ")
    (tmp_path / named[0]).touch()
    assert chosen(recipe(1), named[1], ["signal_lead=300"]) == Cluster(signal_lead=300)


def test_the_default_profile_counts_and_the_named_one_before_it(
    login_node: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (login_node / "default.toml").write_text('partition = "usual"\n')
    assert chosen(recipe(2), None, None) == Cluster(partition="usual")
    assert "profile default" in capsys.readouterr().err
    monkeypatch.setenv("FTLAUNCH_CLUSTER", "mine")
    assert chosen(recipe(2), None, None) == Cluster(partition="mine")
    assert chosen(recipe(2), "default", None) == Cluster(partition="usual")


def test_a_machine_of_its_own_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert chosen(recipe(1), None, None) is None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert chosen(recipe(2), None, None) is None
    monkeypatch.delenv("SLURM_JOB_ID")
    (tmp_path / "sbatch").unlink()
    assert chosen(recipe(2), None, None) is None


def test_what_was_settled_by_this_machine_is_refused_for_a_cluster():
    for_here = msgspec.structs.replace(recipe(2), is_for_here=True)
    with pytest.raises(RecipeError, match="not by the nodes of a cluster"):
        for_recipe(for_here, None, None)
    assert chosen(msgspec.structs.replace(recipe(1), is_for_here=True), None, None) is None
