"""Finding and reading site profiles."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from ftlaunch.cluster.vocabulary import Cluster, seconds
from ftlaunch.errors import Problem, RecipeError, UserError
from ftlaunch.load import decode, layers
from ftlaunch.load.messages import did_you_mean, literal
from ftlaunch.load.origins import Origin, Where

PACKAGE = Path(__file__).parents[1]
START_SECONDS = 60
"""A start that may not even take so long ahead of its signal can take no step."""
EXCLUDE = re.compile(r"^exclude *= *\[[^\]\n]*\]", re.MULTILINE)
SET_BY_FTLAUNCH = (
    "nodes ntasks-per-node dependency output error signal requeue no-requeue kill-on-invalid-dep array export"
    " job-name wrap chdir partition account qos constraint cpus-per-task mem time exclude gres gpus-per-node"
)
"""Flags of sbatch that a job would not work without, or that a key of the profile stands for."""


def find_profile(name_or_path: str) -> Path:
    """The file at the path, else the profile of that name. UserError, saying where it was looked for, if none."""
    path = Path(name_or_path).expanduser()
    if path.suffix == ".toml" and path.is_file():
        return path
    for folder in _folders():
        if (path := folder / f"{name_or_path}.toml").is_file():
            return path
    known = {path.stem for folder in _folders() for path in folder.glob("*.toml")}
    otherwise = f"write slurm/profiles/{name_or_path}.toml; there are {', '.join(sorted(known))}"
    looked = ", ".join(map(str, _folders()))
    raise UserError(
        f"there is no cluster {literal(name_or_path)} in {looked}", did_you_mean(name_or_path, known, otherwise)
    )


def _folders() -> list[Path]:
    """Where profiles are, the user's own first: the project, the user's configuration, the shipped examples."""
    shipped = PACKAGE / "profiles"
    examples = shipped if shipped.is_dir() else PACKAGE.parent.parent / "slurm/profiles"
    return [Path("slurm/profiles"), Path("~/.config/ftlaunch").expanduser(), examples]


def load_cluster(name_or_path: str) -> Cluster:
    """Read and judge a profile. RecipeError with everything that is wrong in it."""
    path = find_profile(name_or_path)
    layer = layers.parse(layers.read_text(path), path)
    where = Where(Origin(f"{path}:1", path.absolute().parent), layer.origins)
    problems = decode.find_problems(Cluster, layer.values, where)
    if not problems:
        cluster = msgspec.convert(layer.values, Cluster)
        problems = list(_contradictions(cluster, where))
        if not problems:
            return cluster
    raise RecipeError(problems)


def exclude(name_or_path: str, nodes: Sequence[str]) -> Path:
    """Have a profile exclude further nodes, and return its file. UserError where its text does not let that be done."""
    path = find_profile(name_or_path)
    before = layers.read_text(path)
    wanted = sorted({*load_cluster(name_or_path).exclude, *nodes})
    line = f"exclude = [{', '.join(map(literal, wanted))}]"
    after, replaced = EXCLUDE.subn(line, before, count=1)
    after = after if replaced else f"{line}\n{before}"
    try:
        changed = layers.parse(after, path).values.get("exclude")
    except RecipeError:
        changed = None
    if changed != wanted:
        raise UserError(f"{path} is written in a way that cannot be changed", f"write it yourself: {line}")
    path.write_text(after)
    return path


def _contradictions(cluster: Cluster, where: Where) -> Iterator[Problem]:
    for key in {*SET_BY_FTLAUNCH.split()} & {*cluster.sbatch}:
        place = where(("sbatch", key))
        yield Problem(place, f"sbatch.{key}", "is ftlaunch's own to set", "remove it; see the profile's other keys")
    for kind in ("", *cluster.stage):
        limit = cluster.resources(kind).time_limit
        path = ("stage", kind, "time_limit") if kind else ("time_limit",)
        if limit and seconds(limit) < cluster.signal_lead + START_SECONDS:
            yield Problem(
                where(path),
                f"stage.{kind}.time_limit" if kind else "time_limit",
                f"leaves no time to train: {limit}, of which the last {cluster.signal_lead} s are for saving",
                f"allow more than {cluster.signal_lead + START_SECONDS} s, or a shorter signal_lead",
            )
