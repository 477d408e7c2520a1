"""Finding and reading site profiles."""

import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from ftlaunch.cluster.vocabulary import Cluster, seconds
from ftlaunch.errors import Problem, RecipeError, UserError
from ftlaunch.load import decode, layers
from ftlaunch.load.messages import as_toml, did_you_mean
from ftlaunch.load.origins import Source, SourceMap, Toml
from ftlaunch.recipe.stages import Stage
from ftlaunch.recipe.types import kinds
from ftlaunch.safety import trust

PACKAGE = Path(__file__).parents[1]
START_SECONDS = 60
"""A start that has less than this before its signal can take no step."""
KINDS = {*kinds(Stage)}
EXCLUDE = re.compile(r"^exclude *= *\[[^\]\n]*\]", re.MULTILINE)
NUMBERS = {"cpus_per_node", "signal_lead", "hang_after", "max_restarts", "successors"}
"""Keys of a profile whose values are no texts."""
SET_BY_FTLAUNCH = (
    "nodes ntasks-per-node dependency output error signal requeue no-requeue kill-on-invalid-dep array export"
    " parsable quiet wait test-only job-name wrap chdir partition account qos constraint cpus-per-task mem time exclude"
    " gres gpus-per-node clusters cluster-constraint export-file input open-mode ntasks uid gid help usage version"
)
"""Flags of sbatch that a job would not work without, or that a key of the profile stands for."""


def find_profile(name_or_path: str) -> Path:
    """The file at the path, else the profile of that name. UserError, saying where it was looked for, if none."""
    path = Path(name_or_path).expanduser()
    if "/" in name_or_path or path.suffix == ".toml":
        if found := next((one for one in (path, path.with_name(f"{path.name}.toml")) if one.is_file()), None):
            return found
        raise UserError(f"there is no profile {path}", "correct the path, or name a profile without a folder")
    for folder in _folders():
        if (path := folder / f"{name_or_path}.toml").is_file():
            return path
    known = {path.stem for folder in _folders() for path in folder.glob("*.toml")}
    otherwise = f"write slurm/profiles/{name_or_path}.toml; there are {', '.join(sorted(known))}"
    looked = ", ".join(map(str, _folders()))
    raise UserError(
        f"there is no cluster {as_toml(name_or_path)} in {looked}", did_you_mean(name_or_path, known, otherwise)
    )


def _folders() -> list[Path]:
    """Where profiles are, the user's own first: the project, the user's configuration, the shipped examples."""
    shipped = PACKAGE / "profiles"
    examples = shipped if shipped.is_dir() else PACKAGE.parent.parent / "slurm/profiles"
    return [Path("slurm/profiles"), Path("~/.config/ftlaunch").expanduser(), examples]


def load_cluster(name_or_path: str | None, settings: Sequence[str] = ()) -> Cluster:
    """Read and judge a profile, with `key=value` settings put in; None: an empty one, which is the cluster's own.

    RecipeError with everything that is wrong in it. UserError where others may write the file: its lines are run.
    """
    path = Path("slurm") if name_or_path is None else find_profile(name_or_path)
    layer = layers.Layer({}, {}) if name_or_path is None else _with_base(path)
    layer, problems = layers.override(layer, [*map(_as_text, settings)], "--site")
    where = SourceMap(Source(f"{path}:1", path.absolute().parent), layer.origins)
    problems += decode.find_problems(Cluster, layer.values, where)
    problems += _strangers(layer.values, where)
    # What can be read is judged as well; a time without its broken signal_lead is not.
    broken = {problem.key.partition(".")[0] for problem in problems}
    sound = {key: layer.values[key] for key in Cluster.__struct_fields__ if key in layer.values and key not in broken}
    cluster = msgspec.convert(sound, Cluster)
    found = _contradictions(cluster, where)
    problems += [one for one in found if "signal_lead" not in broken or "time_limit" not in one.key]
    if problems:
        raise RecipeError(problems)
    return cluster


def _as_text(setting: str) -> str:
    """A setting whose digits are a text, as those of time_limit=90 and account=12345 are."""
    key, _, value = setting.partition("=")
    table, _, name = key.strip().rpartition(".")
    is_number = table == "sbatch" or name in NUMBERS
    return setting if is_number or not value.isdecimal() else f'{key}="{value}"'


def _with_base(path: Path) -> layers.Layer:
    """A profile's tables, over those of the profile that it extends."""
    trust.require(path.absolute())
    layer = layers.parse(layers.read_text(path), path)
    named = layer.values.pop(layers.BASE, None)
    if named is None:
        return layer
    place = layer.origins[(layers.BASE,)].place
    if not isinstance(named, str):
        raise RecipeError([Problem(place, layers.BASE, "is not a profile's name or path", 'write extends = "NAME"')])
    # A path goes by the folder of the file that names it; a bare name is looked up as on the command line.
    base_path = path.parent / Path(named).expanduser()
    try:
        base_path = base_path if base_path.is_file() else find_profile(named)
    except UserError as error:
        raise RecipeError([Problem(place, layers.BASE, error.message, error.remedy)]) from error
    # The `setup` lines of a base are run just as the profile's own are.
    trust.require(base_path.absolute())
    base = layers.parse(layers.read_text(base_path), base_path)
    if layers.BASE in base.values:
        message = f"{base_path} extends another profile itself"
        raise RecipeError([Problem(place, layers.BASE, message, "put both bases into one file")])
    return layers.merge(base, layer)


def exclude(name_or_path: str, nodes: Sequence[str]) -> Path:
    """Have a profile exclude further nodes, and return its file. UserError where its text does not let that be done."""
    path = find_profile(name_or_path)
    before = layers.read_text(path)
    wanted = sorted({*load_cluster(name_or_path).exclude, *nodes})
    line = f"exclude = [{', '.join(map(as_toml, wanted))}]"
    after, replaced = EXCLUDE.subn(line, before, count=1)
    # Without a match the line goes to the top, as at the end it would belong to the file's last table.
    after = after if replaced else f"{line}\n{before}"
    try:
        changed = layers.parse(after, path).values.get("exclude")
    except RecipeError:
        changed = None
    # The pattern is no TOML parser: it may have matched inside a table, so nothing is written before this.
    if changed != wanted:
        raise UserError(f"{path} is written in a way that cannot be changed", f"write it yourself: {line}")
    path.write_text(after)
    return path


def _strangers(values: dict[str, Toml], where: SourceMap) -> Iterator[Problem]:
    """Names in the profile's own tables that nothing heeds, or that would undo what a job needs."""
    flags, stages = values.get("sbatch"), values.get("stage")
    for key in [*flags] if isinstance(flags, dict) else ():
        if any(flag.startswith(key) for flag in SET_BY_FTLAUNCH.split()):  # sbatch takes the beginning of a flag for it
            place = where(("sbatch", key))
            yield Problem(place, f"sbatch.{key}", "is ftlaunch's own to set", "remove it; see the profile's other keys")
    for kind in [*stages] if isinstance(stages, dict) else ():
        if kind not in KINDS:
            remedy = did_you_mean(kind, KINDS, f"stages are {', '.join(sorted(KINDS))}")
            yield Problem(where(("stage", kind)), f"stage.{kind}", "is no kind of stage", remedy)


def _contradictions(cluster: Cluster, where: SourceMap) -> Iterator[Problem]:
    # "" names no [stage.KIND] table and so stands for the top of the profile.
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
    for key, lines in (("setup", cluster.setup), ("notify", [cluster.notify] if cluster.notify else [])):
        if lines and (mistake := _syntax_error(lines)):
            yield Problem(where((key,)), key, f"is no bash: {mistake}", "mend it; bash -n tells more")


def _syntax_error(lines: Sequence[str]) -> str | None:
    """What bash has against lines that it only reads."""
    done = subprocess.run(["bash", "-n"], input="\n".join(lines) + "\n", capture_output=True, text=True, check=False)
    said = done.stderr.strip().partition("\n")[0].removeprefix("bash: ")
    return None if done.returncode == 0 else said or "it cannot be read"
