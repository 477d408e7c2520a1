"""Every command that the documents show is run here, in the order in which they show it."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from tests.conftest import Launch

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
FIRST_GUIDES = ("README.md", "guide/running.md", "guide/data.md")
"""What a reader opens first, below recipes/; the other guides follow by name."""
GUIDES = list(
    dict.fromkeys(ROOT / "recipes" / name for name in FIRST_GUIDES)
    | dict.fromkeys(sorted((ROOT / "recipes" / "guide").glob("*.md")))
)
PAGES = [
    README,
    *GUIDES,
    *(ROOT / name for name in ("slurm/README.md", "src/ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")),
]
COMMANDS = [
    line[2:]
    for page in (README, *GUIDES)
    for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.S)
    for line in block.splitlines()
]

ANOTHER_LAUNCHERS = {
    **{"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"},
    **{
        "OMPI_COMM_WORLD_SIZE": "3",
        "PMI_SIZE": "3",
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_MIXED_PRECISION": "fp16",
    },
}
"""What a notebook under torchrun, a Kubernetes job or MPI leaves in a shell."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder like a clone after `make demo`'s downloads, with a tiny model in the place of the real one."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "SmolLM2-135M-Instruct").symlink_to(tiny_model)
    return folder


def test_the_commands_that_are_shown_work_one_after_another(
    place: Path, launch: Launch, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(place)
    for name, value in ANOTHER_LAUNCHERS.items():
        monkeypatch.setenv(name, value)
    verbs = [shlex.split(command)[1:] for command in COMMANDS if command.startswith("ftlaunch ")]
    assert len(verbs) == 15
    for words in verbs:
        done = launch(*words)
        assert done.stdout or done.stderr, words
    assert (place / "merged" / "model.safetensors").exists()


def test_make_knows_its_targets():
    targets = [word for command in COMMANDS if command.startswith("make ") for word in command.split()[1:]]
    assert targets == ["demo", "check", "test"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_the_recipe_that_the_readme_explains_is_the_one_that_is_shipped():
    import tomllib

    shown = tomllib.loads(re.findall(r"```toml\n(.*?)```", README.read_text(), re.S)[0])
    assert shown == tomllib.loads((ROOT / "recipes" / "quickstart.toml").read_text())


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_says_how_it_is_run(path: Path):
    head = path.read_text().partition("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert re.search(rf"#   ftlaunch (run|compare) (recipes/)?{path.stem}", head)


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200


def test_make_help_lists_every_target():
    listed = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)
    assert listed
    shown = subprocess.run(["make", "--silent", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert set(re.findall(r"^make (\S+) ", shown, re.M)) == set(listed[1].split())


def test_every_file_and_module_that_the_makefile_names_exists():
    told = (ROOT / "Makefile").read_text()
    paths = set(re.findall(r"\b(?:tests|recipes|launcher|src|slurm)/[\w./]+", told))
    modules = {name.replace(".", "/") for name in re.findall(r"-m (tests[\w.]+)", told)}
    assert len(paths) > 10
    assert len(modules) > 3
    missing = [path for path in sorted(paths) if not (ROOT / path).exists()]
    missing += [m for m in sorted(modules) if not any((ROOT / f"{m}{end}").exists() for end in (".py", "/__main__.py"))]
    assert not missing


def test_a_make_target_that_a_page_names_exists():
    listed = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)
    assert listed
    for page in PAGES:
        for targets in re.findall(r"(?:`|^\$ )make ([a-z ]+?)(?:`| *#|$)", page.read_text(), re.M):
            assert set(targets.split()) <= set(listed[1].split()), f"{page.name}: make {targets}"


def heads(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    for path, _, head in (link.partition("#") for link in links):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not head or head in heads(target), f"{path}#{head}"


def test_recipes_readme_leads_to_every_guide_and_recipe():
    links = set(re.findall(r"\]\(([^)\s]+)\)", (ROOT / "recipes" / "README.md").read_text()))
    guides = {f"guide/{page.name}" for page in (ROOT / "recipes" / "guide").glob("*.md")}
    assert guides | {path.name for path in (ROOT / "recipes").glob("*.toml")} <= links


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", ROOT / "src/ARCHITECTURE.md"], ids=lambda page: page.stem)
def test_every_file_that_a_page_for_developers_names_exists(page: Path):
    folders = (ROOT, ROOT / "src/fttrain", ROOT / "launcher/ftlaunch", ROOT / "tests/trainer/adapters")
    text = page.read_text().partition("<!-- tree")[0]
    paths = re.findall(r"`([\w./-]+/(?:[\w.-]+\.\w+)?)`", text)
    named = [path for path in paths if not re.search("KIND|NAME", path)]
    assert len(named) > 15
    assert [path for path in named if not any((folder / path).exists() for folder in folders)] == []
