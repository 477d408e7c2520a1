"""Who may import whom, what must not be loaded, and how large a thing may be."""

import ast
import functools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.tree import PAGE, page

from ftlaunch import __version__

ROOT = Path(__file__).parent.parent
SOURCES = {"ftlaunch": ROOT / "launcher/ftlaunch", "fttrain": ROOT / "src/fttrain"}

FLOORS = {
    "ftlaunch": (
        "errors",
        "recipe",
        "load rows safety tools",
        "run",
        "cluster processes",
        "plan",
        "rules",
        "backend",
        "watch",
        "compare",
        "report",
        "cli",
        "__main__",
    ),
    "fttrain": (
        "distributed hub noise objectives quant",
        "adapters data",
        "__main__ evaluation model",
        "engine superweights",
        "artifact checkpoint",
        "merging preference",
        "training",
        "answering",
        "serving",
        "ppo tools",
        "stages",
    ),
    "ftlaunch.backend": (
        "__init__ display folders node_folder runs status watchdog",
        "protocol supervisor",
        "driving",
        "local slurm",
        "backends",
        "control prepare",
        "replan",
    ),
    "ftlaunch.cli": (
        "options profile text",
        "cluster watch",
        "compare model report run",
        "evaluate recipe ship",
        "preview",
        "__init__",
    ),
    "ftlaunch.cluster": (
        "__init__ vocabulary",
        "profiles",
    ),
    "ftlaunch.compare": (
        "__init__ measures statistics variants",
        "runner table",
    ),
    "ftlaunch.load": (
        "origins",
        "messages toml_lines",
        "catalog key_advice layers paths type_check",
        "decode",
        "__init__",
    ),
    "ftlaunch.plan": (
        "__init__ family launch_config machine resolve",
        "chain cost",
        "describe",
        "plan",
    ),
    "ftlaunch.plan.cost": (
        "__init__ calibration devices families known",
        "shape",
        "trained",
        "activations body ppo",
        "answers",
        "memory",
        "disk fit speed",
        "costs",
        "words",
    ),
    "ftlaunch.report": (
        "__init__ facts markup",
        "curves",
        "model_card plots svg trace",
        "run_page",
        "overlay_page",
        "write",
        "at_end",
    ),
    "ftlaunch.processes": (
        "__init__ environment memory outcome signals",
        "guard lock trainer",
    ),
    "ftlaunch.recipe": (
        "__init__ names types",
        "adapter data model noise track",
        "stages",
        "recipe",
        "schema",
    ),
    "ftlaunch.rows": (
        "template",
        "files groups messages tables unfit",
        "lines",
        "conversations readers",
        "pairs",
        "looks prompts",
        "columns",
        "__init__",
    ),
    "ftlaunch.rules": (
        "compatibility data secrets track",
        "stage",
        "adapter combinations evaluate evaluations noise order ppo strategy",
        "__init__",
    ),
    "ftlaunch.rules.compatibility": (
        "axes",
        "refusals",
        "__init__",
        "table",
        "__main__",
    ),
    "ftlaunch.run": (
        "__init__ files spec tail",
        "digests layout records",
        "outputs pace progress provenance",
        "changes snapshot",
    ),
    "ftlaunch.watch": (
        "__init__ status",
        "logs screen",
    ),
    "fttrain.adapters": (
        "frozen_weights targets",
        "coverage peft_files virtual_tokens",
        "low_rank",
        "adalora dora pissa",
        "__init__",
    ),
    "fttrain.answering": (
        "__init__ conversation generation likelihood",
        "choices streaming",
        "examination",
        "in_training predictions",
    ),
    "fttrain.checkpoint": (
        "__init__ manifest pieces random_states shards shared_memory writer_process",
        "store writer",
    ),
    "fttrain.data": (
        "__init__ audit blind control cores limits node_arrays segments sources templates",
        "skeleton",
        "render",
        "chat",
        "order token_set",
        "held_out",
        "drawn making",
        "batches tokens",
        "pins prepare prompts",
        "feed",
    ),
    "fttrain.evaluation": (
        "__init__ perplexity prompts words",
        "metrics",
        "scoring",
    ),
    "fttrain.merging": (
        "__init__ probes weight_map",
        "deltas",
        "dry_run verify",
        "merge",
    ),
    "fttrain.model": (
        "__init__ attention classifier dropout families limits sharded tokenizer",
        "borders",
        "halves",
        "packing",
        "completeness",
        "scorer",
    ),
    "fttrain.noise": (
        "__init__ activation_functions row_index",
        "kinds modules neftune",
        "hooks replace_activations",
        "adversarial",
        "build",
    ),
    "fttrain.objectives": (
        "__init__ ppo preference",
        "logps",
        "r_drop",
    ),
    "fttrain.ppo": (
        "__init__ actor vllm_engine",
        "rollout",
        "experience vllm_rollout",
        "rewards",
        "feed",
    ),
    "fttrain.preference": (
        "__init__ objective",
        "reference",
    ),
    "fttrain.quant": (
        "__init__ grid ternary",
        "calibrate",
        "activations qat weights",
        "packing",
    ),
    "fttrain.serving": (
        "__init__ guard schema worker",
        "api",
    ),
    "fttrain.superweights": (
        "__init__ projections",
        "ablate find known",
        "layers plots",
    ),
    "fttrain.tools": (
        "__init__ output",
        "calibrate chat import_gguf merge preview push quantize superweights unpack",
        "evaluate harness serve",
    ),
    "fttrain.training": (
        "__init__ counters metrics optim pace preflight tracking",
        "nonfinite",
        "loop probe",
        "session",
    ),
}
"""Files and packages, lowest floor first: each imports from lower floors only, so those that share one are strangers.

The floors of a package's own files stand under its name; where they do not, its files agree among themselves.
"""

STRANGERS = {"fttrain.stages"}
"""Packages whose files do not import each other at all."""

TRAINER_MAY_IMPORT = {
    *("errors", "recipe", "rows", "run", "safety", "tools"),
    "plan.resolve",
}
LAUNCHER_MAY_IMPORT = {"typer", "msgspec", "rich"} | sys.stdlib_module_names
PYARROW_ONLY_IN = {"tables"}
MATPLOTLIB_ONLY_IN = {"plots"}
SUBMITIT_ONLY_IN = {"submit", "request", "probe", "node_job", "held", "stage_job"}
HEAVY = {
    *("torch", "transformers", "datasets", "numpy", "accelerate", "deepspeed"),
    *("pydantic", "submitit", "rich", "matplotlib"),
}
FORBIDDEN_WORDS = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc"}
MOST_ROOMS = {"ftlaunch": 16, "fttrain": 21}
"""Packages and modules on each program's top floor, `__main__` not counted."""
CALLED_BY_JOBS = SOURCES["ftlaunch"] / "backend/slurm/entry.py"
"""Who submits a stage names its function, which imports what it calls in the job: another process."""
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


def floor(scope: str, name: str) -> int:
    for number, names in enumerate(FLOORS[scope]):
        if name in names.split():
            return number
    raise AssertionError(f"give {scope}.{name} a floor in {Path(__file__).name}")


def exists(package: str, place: tuple[str, ...]) -> bool:
    path = SOURCES[package].joinpath(*place)
    return path.with_suffix(".py").is_file() or path.is_dir()


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", files(), ids=name)
def test_a_file_imports_from_lower_floors_only(path: Path) -> None:
    package, place = inside(path)
    for other, target in imports(path):
        if not place or other != package or not exists(package, target[:1]):
            continue
        shared = next((n for n, (a, b) in enumerate(zip(place, target, strict=False)) if a != b), len(place))
        assert not shared or ".".join((package, *place[:shared])) not in STRANGERS, f"{place} imports {target}"
        scope = ".".join((package, *place[:shared]))
        above = place[shared] if len(place) > shared else "__init__"
        below = target[shared] if len(target) > shared and exists(package, target[: shared + 1]) else "__init__"
        if scope in FLOORS and above != below:
            assert floor(scope, below) < floor(scope, above), f"{scope}: {above} imports {below}"


def test_every_name_with_a_floor_exists() -> None:
    for scope, floors in FLOORS.items():
        package, *place = scope.split(".")
        for stem in " ".join(floors).split():
            assert exists(package, (*place, stem)), f"there is no {scope}.{stem}"


def test_every_file_has_a_floor() -> None:
    for path in files():
        package, place = inside(path)
        for depth in range(len(place) + (path.name == "__init__.py")):
            scope = ".".join((package, *place[:depth]))
            if place and scope in FLOORS:
                floor(scope, place[depth] if len(place) > depth else "__init__")


def test_the_top_floors_keep_a_size() -> None:
    for package, most in MOST_ROOMS.items():
        places = [place for other, place in map(inside, files()) if other == package and place]
        rooms = {place[0] for place in places} - {"__main__"}
        assert len(rooms) <= most, f"{package} has {len(rooms)} rooms: {sorted(rooms)}"


def imported_files(path: Path) -> set[Path]:
    """The files of the two packages that a file imports by name."""
    found = set[Path]()
    for package, target in imports(path):
        depth = next(
            (n for n in range(len(target), -1, -1) if package in SOURCES and exists(package, target[:n])), None
        )
        if depth is not None:
            place = SOURCES[package].joinpath(*target[:depth])
            found.add(place / "__init__.py" if place.is_dir() else place.with_suffix(".py"))
    return found


def test_no_files_import_each_other_in_a_circle() -> None:
    rest = {path: imported_files(path) - {path} for path in files() if path != CALLED_BY_JOBS}
    while free := [path for path, below in rest.items() if not below & rest.keys()]:
        for path in free:
            del rest[path]
    assert not rest, f"a circle in: {sorted(map(name, rest))}"


@pytest.mark.parametrize("path", files(), ids=name)
def test_packages_meet_where_they_may(path: Path) -> None:
    package, _ = inside(path)
    for other, target in imports(path):
        if package == "ftlaunch":
            more = {"submitit"} if path.stem in SUBMITIT_ONLY_IN and path.parent.name == "slurm" else set[str]()
            more |= {"pyarrow"} if path.parent.name == "rows" and path.stem in PYARROW_ONLY_IN else set[str]()
            more |= {"matplotlib"} if path.stem in MATPLOTLIB_ONLY_IN and path.parent.name == "report" else set[str]()
            assert other in LAUNCHER_MAY_IMPORT | more | {"ftlaunch"}, f"the launcher imports {other}"
        elif other == "ftlaunch":
            assert {target[0], ".".join(target[:2])} & TRAINER_MAY_IMPORT, f"the trainer imports ftlaunch.{target[0]}"


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


RIDDLES = re.compile(r"\b(anew|besides?|ahead|behind|aside)\b", re.IGNORECASE)
"""Words that CONTRIBUTING.md forbids: a reader cannot tell from them which of two things comes first."""


@pytest.mark.parametrize("path", files(), ids=name)
def test_no_riddle_word_is_left(path: Path) -> None:
    assert not RIDDLES.findall(path.read_text())


FRAGMENT = re.compile(r"(Of|With|From now on|By|As|At|Until|Before|After|For|In|On|Such|So)\b|Nothing[,:]")
"""What a docstring begins with that is no sentence by itself: it would go on where the name leaves off."""


@pytest.mark.parametrize("path", files(), ids=name)
def test_a_docstring_is_no_fragment(path: Path) -> None:
    for node in nodes(path):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            assert not FRAGMENT.match(node.value.value), f"line {node.lineno}: {node.value.value}"


def test_no_two_test_files_share_a_name() -> None:
    """Pytest imports them by their bare names."""
    names = sorted(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert names == sorted(set(names))


ASK_NOBODY = {"families", "import_gguf"}
"""They load from folders that hub has judged, and a file with nothing next to it."""
UNSAFE_CALLS = {"torch.load", "pickle.load", "pickle.loads", "eval", "exec", "os.system", "marshal.loads"}


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in nodes(path) if isinstance(node, ast.Call))


@pytest.mark.parametrize("path", files(), ids=name)
def test_nothing_is_unpickled_and_no_model_brings_code(path: Path) -> None:
    for call in calls(path):
        assert ast.unparse(call.func) not in UNSAFE_CALLS, f"{path}:{call.lineno}"
        for keyword in call.keywords:
            told = (keyword.arg, ast.unparse(keyword.value))
            assert told not in {("weights_only", "False"), ("shell", "True")}, f"{path}:{call.lineno}"
            is_numpys = ast.unparse(call.func) == "np.load"
            assert not (is_numpys and told == ("allow_pickle", "True")), f"{path}:{call.lineno}"
            assert keyword.arg != "trust_remote_code" or told[1] == "False", f"{path}:{call.lineno}"


@pytest.mark.parametrize("path", files(), ids=name)
def test_what_loads_models_asks_whether_it_may(path: Path) -> None:
    loads = [call for call in calls(path) if ast.unparse(call.func).endswith(".from_pretrained")]
    if loads and path.stem not in ASK_NOBODY:
        imported = {(package, target[0]) for package, target in imports(path) if target}
        assert ("fttrain", "hub") in imported, f"{path}: have hub judge what is loaded"
    for call in loads:
        told = {keyword.arg for keyword in call.keywords}
        is_peft = ast.unparse(call.func).startswith("Peft")
        assert is_peft or {"trust_remote_code", None} & told, f"{path}:{call.lineno}: trust_remote_code=False"


HELP = """\
import sys
before = {*sys.modules}
from ftlaunch.__main__ import main
try:
    main()
finally:
    print(*sorted({*sys.modules} - before), file=sys.stderr)
"""


@pytest.mark.parametrize("line", [[], ["-h"], ["--help"], ["--version"]])
def test_help_and_version_load_nothing_at_all(line: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", HELP, *line], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "ftlaunch ftlaunch.__main__"


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
from ftlaunch.__main__ import main
try:
    main()
except SystemExit as ended:
    print(json.dumps([ended.code, sorted(sys.modules)]), file=sys.stderr)
"""
UNASKED = {
    *("ftlaunch.backend", "ftlaunch.cluster", "ftlaunch.compare", "ftlaunch.processes", "ftlaunch.run.layout"),
    *("ftlaunch.plan.cost", "ftlaunch.plan.describe", "ftlaunch.plan.launch_config", "ftlaunch.plan.machine"),
    *("ftlaunch.rules.strategy", "ftlaunch.rules.ppo", "ftlaunch.rules.evaluate"),
    *("ftlaunch.tools", "gzip", "socket", "sqlite3", "tempfile"),
}
"""What the plain RECIPE does not ask `validate` for: costs, rare stages, runs, processes, packed and grouped rows."""


def loaded_by(folder: Path, *line: str) -> set[str]:
    """The modules that a verb has loaded when it ends well, called with RECIPE in the folder."""
    (folder / "r.toml").write_text(RECIPE)
    (folder / "q.jsonl").write_text('{"q": "2+2", "a": "4"}\n')
    done = subprocess.run([sys.executable, "-c", PROBE, *line], cwd=folder, capture_output=True, text=True, check=True)
    code, loaded = json.loads(done.stderr.splitlines()[-1])
    assert code in {0, None}
    return set(loaded)


@pytest.mark.parametrize(
    "line", [["--version"], ["validate", "r.toml"], ["plan", "r.toml"], ["status"], ["status", "--json"]]
)
def test_everyday_verbs_load_nothing_heavy(line: list[str], tmp_path: Path) -> None:
    loaded = {name.partition(".")[0] for name in loaded_by(tmp_path, *line)}
    assert "ftlaunch" in loaded
    assert HEAVY.isdisjoint(loaded)


def test_validate_loads_only_what_a_recipe_asks_for(tmp_path: Path) -> None:
    assert loaded_by(tmp_path, "validate", "r.toml").isdisjoint(UNASKED)
    few_bits = ("--set", "adapter.kind=lora", "--set", "model.quantization=nf4")
    assert loaded_by(tmp_path, "validate", "r.toml", *few_bits) & UNASKED == {"ftlaunch.plan.cost"}


def test_commands_that_are_printed_quote_their_paths() -> None:
    bare = re.compile(r"ftlaunch [a-z]+ (?:[^\"{]*\{)[^}\"]*\bpath\}")
    found = {path: bare.findall(path.read_text()) for package in SOURCES.values() for path in package.rglob("*.py")}
    found.pop(SOURCES["ftlaunch"] / "cli" / "text.py")  # its `path` is quoted already
    assert {path: bares for path, bares in found.items() if bares} == {}


def test_the_tree_in_the_architecture_page_is_that_of_the_files() -> None:
    assert PAGE.read_text() == page(), "it is out of date: .venv/bin/python -m tests.tree --write"


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert ROOT / project["tool"]["hatch"]["version"]["path"] == SOURCES["ftlaunch"] / "__init__.py"
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_a_rank_loads_what_scores_answers_only_where_a_stage_does() -> None:
    code = "import sys, fttrain.stages.sft; print(*{'evaluate', 'transformers.pipelines'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
