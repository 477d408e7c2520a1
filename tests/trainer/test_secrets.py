"""Secrets in the environment of real runs, one that ends well and one that fails, whose processes leak them."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from tests.conftest import Launch

from ftlaunch.run.layout import RunDir
from ftlaunch.safety.redact import HIDDEN

SECRETS = {
    "HF_TOKEN": "hf_CanaryCanaryCanary0123456789abcd",
    "WANDB_API_KEY": "0123456789cafe0123456789cafe0123456789ca",
    "LAB_SECRET": 'ca/na+ry = "q\'7" ü',
}
SECRET_PRINTING = Path(__file__).with_name("secret_printing")
MERGE = '[[stage]]\nkind = "merge"\n'


def forms(secret: str) -> list[bytes]:
    """A secret in every way that one may be found in."""
    raw = secret.encode()
    encoded = [base64.b64encode(b"user:"[:before] + raw) for before in (0, 1, 2, 5)]
    middles = [text[4:-6] for text in encoded]  # the ends are the neighbours' too
    return [raw, quote(secret).encode(), quote(secret, safe="").encode(), json.dumps(secret)[1:-1].encode(), *middles]


def found(content: bytes) -> list[str]:
    return [name for name, secret in SECRETS.items() if any(form in content for form in forms(secret))]


class Watcher(threading.Thread):
    """Reads the command line of every process, all the time."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: set[bytes] = set()
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.02):
            for process in Path("/proc").glob("[0-9]*"):
                self._read(process)

    def _read(self, process: Path) -> None:
        try:
            self.seen.add((process / "cmdline").read_bytes())
        except OSError:
            return  # it has ended

    def stop(self) -> set[bytes]:
        self._over.set()
        self.join()
        return self.seen


@pytest.fixture
def watcher() -> Iterator[Watcher]:
    watcher = Watcher()
    watcher.start()
    yield watcher
    watcher.stop()


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the processes note what they unpickle."""
    path = tmp_path / "notes"
    for name, value in {**SECRETS, "PYTHONPATH": str(SECRET_PRINTING), "PRINTING_NOTES": str(path)}.items():
        monkeypatch.setenv(name, value)
    return path


def assert_clean(run: RunDir) -> None:
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert {path: found(path.read_bytes()) for path in files if found(path.read_bytes())} == {}
    log = run.stage_dir("01-sft").all_attempts()[-1].rank_log(0).read_text()
    assert f"HF_TOKEN is {HIDDEN}" in log, "nothing was leaked, so nothing is proven"
    assert f"from C++: {HIDDEN} {HIDDEN}" in log
    assert f"HF_TOKEN is {HIDDEN}" in run.stage_dir("01-sft").all_attempts()[-1].launch_log.read_text()


def test_a_run_that_ends_well_leaves_no_secret_and_unpickles_nothing(
    tmp_path: Path, recipe: Callable[..., Path], launch: Launch, watcher: Watcher, notes: Path
):
    path = recipe()
    path.write_text(path.read_text().replace("[parallel]", f"{MERGE}[parallel]"))
    run = RunDir(tmp_path / "run")
    plan = launch("plan", path, "--run-dir", run.path)
    done = launch("run", path, "--run-dir", run.path)
    said = launch("logs", run.path)
    commands = watcher.stop()
    assert_clean(run)
    for output in (plan, done, said):
        assert found((output.stdout + output.stderr).encode()) == []
    assert any(b"fttrain" in command for command in commands)
    assert [command for command in commands if found(command)] == []
    assert not notes.exists(), notes.read_text()


def test_a_run_that_fails_leaves_no_secret_in_its_error(
    tmp_path: Path, recipe: Callable[..., Path], launch: Launch, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PRINTING_FAILS", "yes")
    run = RunDir(tmp_path / "run")
    failed = launch("run", recipe(), "--run-dir", run.path, check=False)
    assert_clean(run)
    error = run.stage_dir("01-sft").all_attempts()[-1].error
    assert f"'HF_TOKEN': {HIDDEN}" in json.loads(error.read_text())["message"].replace(f"'{HIDDEN}'", HIDDEN)
    told = launch("logs", run.path, "--first-error", check=False)
    for output in (failed, told):
        text = output.stdout + output.stderr
        assert "cannot sign in with" in text
        assert found(text.encode()) == []


def test_a_secret_in_a_recipe_path_or_argument_is_refused_and_not_repeated(
    tmp_path: Path, recipe: Callable[..., Path], launch: Launch, rows_file: Path
):
    run = RunDir(tmp_path / "run")
    folder = tmp_path / SECRETS["HF_TOKEN"]
    folder.mkdir()
    (folder / "rows.jsonl").write_text(rows_file.read_text())
    for arguments in (
        ["--set", f"data.rows.path={folder}/rows.jsonl"],
        ["--set", f"data.rows.system={SECRETS['WANDB_API_KEY']}"],
        ["--set", f"{SECRETS['HF_TOKEN']}=1"],
        ["--run-dir", folder / "run"],
    ):
        refused = launch("run", recipe(), "--run-dir", run.path, *arguments, check=False)
        assert refused.returncode == 2
        assert found((refused.stdout + refused.stderr).encode()) == []
    assert not run.path.exists()
    assert not (folder / "run").exists()
