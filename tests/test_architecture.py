"""Who may import whom, what must not be loaded, and how large a thing may be."""

import ast
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {"ftlaunch": ROOT / "launcher/ftlaunch", "fttrain": ROOT / "src/fttrain"}

FLOORS = {
    "ftlaunch": (
        "errors recipe where tail processes",
        "rundir wording lines resolve templates schema interrupt progress provenance",
        "layers places suits vocabulary shipped fill node outcome lock display",
        "decode turns plan status",
        "load rows runs launch",
        "data_rules stage_rules logs backend",
        "rules control",
        "prepare",
        "cli",
        "__main__",
    ),
    "fttrain": (
        "objectives adapters attention fold leave metrics optim world",
        "data",
        "model",
        "engine chat gguf likeness preview",
        "artifact shards",
        "checkpoint merge",
        "loop",
        "stages",
        "__main__",
    ),
}
"""Files and packages, lowest floor first. Each imports from lower floors only; inside a package the files agree."""

STRANGERS = {("ftlaunch", "backend"), ("fttrain", "stages")}
"""Packages whose files do not import each other."""

TRAINER_MAY_IMPORT = {"errors", "recipe", "rundir", "rows", "fill", "templates", "turns"}
LAUNCHER_MAY_IMPORT = {"typer", "msgspec", "rich"} | sys.stdlib_module_names
HEAVY = {"torch", "transformers", "datasets", "numpy", "pydantic", "submitit", "rich", "accelerate", "deepspeed"}
FORBIDDEN_WORDS = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc"}
LONGEST_FILE = 450
LONGEST_FUNCTION = 60

Import = tuple[str, tuple[str, ...]]
"""A top-level package and the names below it: ("ftlaunch", ("backend", "local"))."""


def files() -> list[Path]:
    return [path for folder in SOURCES.values() for path in sorted(folder.rglob("*.py"))]


def inside(path: Path) -> Import:
    """The package of a file and its place in it."""
    package = next(name for name, folder in SOURCES.items() if path.is_relative_to(folder))
    place = path.relative_to(SOURCES[package]).with_suffix("").parts
    return package, place[:-1] if place[-1] == "__init__" else place


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def imports(path: Path) -> Iterator[Import]:
    """Everything that a file imports, at its top or inside a function."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *place = name.split(".")
            yield package, tuple(place)


def floor(package: str, place: tuple[str, ...]) -> int:
    for number, names in enumerate(FLOORS[package]):
        if place[0] in names.split():
            return number
    raise AssertionError(f"give {package}.{place[0]} a floor in {Path(__file__).name}")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", files(), ids=name)
def test_a_file_imports_from_lower_floors_only(path: Path) -> None:
    package, place = inside(path)
    if not place:
        return
    own = floor(package, place)
    for other, target in imports(path):
        if other != package or not target or not (SOURCES[package] / target[0]).exists() | is_file(package, target[0]):
            continue
        if target[0] == place[0]:
            assert (package, place[0]) not in STRANGERS, f"{place} imports {target}: they are strangers"
        else:
            assert floor(package, target) < own, f"{'.'.join(place)} (floor {own}) imports {'.'.join(target)}"


def is_file(package: str, stem: str) -> bool:
    return (SOURCES[package] / f"{stem}.py").exists()


def test_every_name_with_a_floor_exists() -> None:
    for package, floors in FLOORS.items():
        for stem in " ".join(floors).split():
            assert is_file(package, stem) or (SOURCES[package] / stem).is_dir(), f"there is no {package}.{stem}"


@pytest.mark.parametrize("path", files(), ids=name)
def test_packages_meet_where_they_may(path: Path) -> None:
    package, _ = inside(path)
    for other, target in imports(path):
        if package == "ftlaunch":
            assert other in LAUNCHER_MAY_IMPORT | {"ftlaunch"}, f"the launcher imports {other}"
        elif other == "ftlaunch":
            assert target[0] in TRAINER_MAY_IMPORT, f"the trainer imports ftlaunch.{target[0]}"


@pytest.mark.parametrize("path", files(), ids=name)
def test_a_file_is_named_for_what_it_tells(path: Path) -> None:
    assert not FORBIDDEN_WORDS & set(path.stem.split("_"))


@pytest.mark.parametrize("path", files(), ids=name)
def test_files_and_functions_keep_a_size(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_FILE
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= LONGEST_FUNCTION, f"{node.name} has {lines} lines"


RECIPE = """\
name = "r"
model.path = "org/model"
[data.q]
path = "q.jsonl"
prompt = "{q}"
completion = "{a}"
[[stage]]
kind = "sft"
data = "q"
"""
PROBE = """\
import json, sys
from ftlaunch import cli
try:
    cli.main()
except SystemExit as ended:
    print(json.dumps([ended.code, sorted({name.partition(".")[0] for name in sys.modules})]), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "line", [["--help"], ["validate", "r.toml"], ["plan", "r.toml"], ["status"], ["status", "--json"]]
)
def test_everyday_verbs_load_nothing_heavy(line: list[str], tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(RECIPE)
    (tmp_path / "q.jsonl").write_text('{"q": "2+2", "a": "4"}\n')
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *line], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    code, loaded = json.loads(done.stderr.splitlines()[-1])
    assert code in {0, None}
    assert "ftlaunch" in loaded
    assert HEAVY.isdisjoint(loaded)
