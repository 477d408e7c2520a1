"""The command line, in this process where that is enough and as a real process where it is not."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import msgspec
import pytest
import typer.testing
from tests.launcher.conftest import Call
from tests.launcher.scripted_runs import make_plan, write_run

from ftlaunch import __main__, cli, processes
from ftlaunch.backend import control, supervisor
from ftlaunch.errors import BAD_INPUT, DONE, INTERRUPTED, STAGE_FAILED, STOPPED
from ftlaunch.plan.machine import Machine
from ftlaunch.plan.plan import Plan
from ftlaunch.processes import environment
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.run.layout import RunDir
from ftlaunch.tools import (
    ChatOptions,
    EvaluateOptions,
    HarnessOptions,
    ImportOptions,
    MergeOptions,
    PreviewOptions,
    QuantizeOptions,
    ServeOptions,
    SpikeLimits,
    SuperweightsOptions,
    ToolOptions,
    UnpackOptions,
)

TOOLS = {f"fttrain.tools.{kind.__struct_config__.tag}": kind for kind in ToolOptions.__subclasses__()}

RECIPE = """\
# A small one.
name = "small"

[model]
path = "org/model"

[adapter]
kind = "lora"

[data.q]
path = "q.jsonl"
prompt = "{q}"
completion = "{a}"

[[stage]]
kind = "sft"
data = "q"

[[stage]]
kind = "merge"

[parallel]
strategy = "zero2"
procs_per_node = 2
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text('{"q": "2+2", "a": "4"}\n')
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(control, "POLL_SECONDS", 0.01)


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard() -> Iterator[None]:
    """A test run in the background may have been started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_spec", lambda name: name)


def spawn(*arguments: object, **how: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "ftlaunch", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


def leave_behind(run: RunDir) -> subprocess.Popen[bytes]:
    """A process of a run's attempt that nobody drives."""
    return subprocess.Popen(
        [sys.executable, "-S", "-c", "import time; time.sleep(60)"],
        env={processes.ATTEMPT: str(run.path / "01-sft/attempts/1")},
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 5
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists()


def test_validate_says_what_would_run(call: Call, recipe: Path) -> None:
    assert call("validate", recipe) == (DONE, "recipe.toml: ok — sft, merge on 2 processes\n", "")


def test_a_recipes_problems_go_to_stderr_with_their_remedies(call: Call, recipe: Path) -> None:
    code, out, err = call("validate", recipe, "--set", "stage.0.epocs=2")
    assert (code, out) == (BAD_INPUT, "")
    assert err.startswith("error: --set stage.0.epocs=2: ")
    assert 'did you mean "epochs"' in err


def test_plan_shows_every_file_and_command(call: Call, recipe: Path) -> None:
    code, out, _ = call("plan", recipe)
    plan = call("plan", recipe, "--json")[1]
    steps = msgspec.json.decode(plan, type=Plan).stages
    assert code == DONE
    assert [step.name for step in steps] == ["01-sft", "02-merge"]
    for step in steps:
        assert shlex.join(step.command) in out
        assert all(content.rstrip() in out for content in step.files.values())
        assert all(note in out for note in step.notes.values())
    assert not (recipe.parent / "runs").exists()


def test_a_plans_environment_is_part_of_its_command(call: Call, recipe: Path) -> None:
    out = call("plan", recipe, "--set", "parallel.device=cpu")[1]
    assert "&& env CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu accelerate launch" in out


def test_a_dry_run_is_the_plan(call: Call, recipe: Path) -> None:
    assert call("run", recipe, "--dry-run") == call("plan", recipe)


def test_short_forms_mean_their_settings(call: Call, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # without sbatch
    short = call("plan", recipe, "--nodes", "2", "--procs-per-node", "4", "--json")
    assert short == call("plan", recipe, "--set", "parallel.nodes=2", "--set", "parallel.procs_per_node=4", "--json")
    assert json.loads(short[1])["steps"][0]["step"]["world_size"] == 8


@pytest.mark.usefixtures("torch_is_there")
def test_several_nodes_need_a_cluster(call: Call, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # without sbatch
    code, _, err = call("run", recipe, "--nodes", "2")
    assert (code, "several nodes need a cluster" in err) == (BAD_INPUT, True)
    assert not (recipe.parent / "runs").exists()


@pytest.mark.usefixtures("torch_is_there")
def test_a_cache_that_cannot_be_written_is_told_before_anything_is_there(
    call: Call, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(recipe))
    code, _, err = call("run", recipe)
    assert (code, f"tokens cannot be kept in {recipe}/ftlaunch/tokens" in err) == (BAD_INPUT, True)
    assert "set XDG_CACHE_HOME to" in err
    assert not (recipe.parent / "runs").exists()


@pytest.mark.usefixtures("torch_is_there")
def test_run_writes_and_drives(call: Call, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftlaunch.backend.protocol.make_plan", scripted_plan)
    code, out, err = call("run", recipe)
    assert (code, out) == (DONE, "")
    assert err.startswith(f"small → {recipe.parent}/runs/small\n01-sft: 2 processes")
    assert "01-sft  done" in err
    assert (recipe.parent / "runs/small/recipe.toml").read_text() == RECIPE
    code, out, err = call("run", recipe, "--detach")
    assert (code, out, "already finished" in err) == (DONE, "", True)


@pytest.mark.usefixtures("torch_is_there")
def test_a_run_that_is_done_says_what_it_made_and_how_to_try_it(call: Call, tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "train")
    artifact = run.stage_dir("01-sft").artifact
    artifact.mkdir()
    closing = f'model: {artifact}\n  try it: ftlaunch chat {artifact} --prompt "…"\n'
    page = run.path / "report" / "index.html"
    assert call("resume", run.path)[2].endswith(f"01-sft  done in 0:00\n{closing}report: {page}\n")
    assert page.exists()
    assert call("resume", run.path)[2] == f"r is already finished: {run.path}\n{closing}"
    assert call("status", run.path)[1].endswith(closing)


@pytest.mark.usefixtures("torch_is_there")
def test_a_run_that_failed_says_how_to_look_into_it_and_go_on(call: Call, tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "fail")
    closing = f"  in full: ftlaunch logs {run.path} --first-error\nreport: {run.report / 'index.html'}\n"
    assert call("resume", run.path)[2].endswith(closing)
    assert "rank 1: boom" in (run.report / "index.html").read_text()
    said = call("status", run.path)[1]
    assert f"ftlaunch logs {run.path} --first-error" in said
    assert said.endswith(f"ftlaunch resume {run.path}\n")


def test_the_plan_tells_the_learning_rate_and_whether_it_was_chosen(call: Call, recipe: Path) -> None:
    assert "learning rate  0.0002 (none is given; this suits sft with lora), cosine\n" in call("plan", recipe)[1]
    own = ("--set", "stage.0.learning_rate=3e-5", "--set", "stage.0.warmup=0.1")
    assert "learning rate  3e-05, cosine after a warm-up of 0.1 of all steps\n" in call("plan", recipe, *own)[1]


GOOD_LINE = b'{"q": "2+2", "a": "4"}\n'


@pytest.mark.usefixtures("torch_is_there")
@pytest.mark.parametrize(
    ("content", "where", "message", "remedy"),
    [
        pytest.param(b"", "", "the file has no rows", "written to the end", id="empty"),
        pytest.param(GOOD_LINE + b'{"q": "2+2"}\n', ":2", "field a is missing", "the fields q", id="no column"),
        pytest.param(
            GOOD_LINE + '{"q": "à", "a": "4"}\n'.encode("latin-1"), ":2", "not UTF-8 (byte 0xe0)", "iconv", id="latin-1"
        ),
        pytest.param(
            GOOD_LINE + b'{"q": "' + b"x" * 10_000_000 + b'"}\n', ":2", "longer than 8 MiB", "a line of its", id="long"
        ),
        pytest.param(GOOD_LINE + b'{"q": "2+2", "a": NaN}\n', ":2", "field a is nan", "leave such rows out", id="nan"),
    ],
)
def test_broken_data_is_refused_before_anything_is_written(
    call: Call, recipe: Path, content: bytes, where: str, message: str, remedy: str
) -> None:
    rows = recipe.with_name("q.jsonl")
    rows.write_bytes(content)
    code, out, err = call("run", recipe)
    assert (code, out) == (BAD_INPUT, "")
    [said, advice] = err.splitlines()
    assert said.startswith(f"error: {rows}{where}: data.q: ")
    assert message in said
    assert remedy in advice
    assert {path.name for path in recipe.parent.iterdir()} == {"recipe.toml", "q.jsonl"}


@pytest.mark.usefixtures("torch_is_there")
@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        pytest.param('path = "org/model"', "path = org/model", 5, id="no TOML"),
        pytest.param('kind = "lora"', 'kind = "lora"\nrnk = 4', 9, id="unknown key"),
        pytest.param('"zero2"', '"single"', 23, id="contradiction"),
    ],
)
def test_a_broken_recipe_is_refused_before_anything_is_written(
    call: Call, recipe: Path, old: str, new: str, line: int
) -> None:
    recipe.write_text(RECIPE.replace(old, new, 1))
    code, out, err = call("run", recipe)
    assert (code, out) == (BAD_INPUT, "")
    assert err.startswith(f"error: {recipe}:{line}: ")
    assert "  → " in err
    assert {path.name for path in recipe.parent.iterdir()} == {"recipe.toml", "q.jsonl"}


def scripted_plan(_: Recipe, run_dir: Path, machine: Machine) -> Plan:  # noqa: ARG001 as make_plan has it
    return make_plan(run_dir.absolute(), "train")


def test_without_torch_the_remedy_is_the_extra(call: Call, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_spec", lambda _: None)
    write_run(recipe.parent / "runs/r", "train")
    for line in (("run", recipe), ("resume", "r"), ("merge", "x", "y"), ("preview", recipe)):
        code, _, err = call(*line)
        assert (code, err.splitlines()[-1]) == (BAD_INPUT, "  → pip install 'ftlaunch[train]'")
    assert not (recipe.parent / "runs/small").exists()


@pytest.mark.usefixtures("torch_is_there")
@pytest.mark.parametrize(
    ("act", "code"), [("train", DONE), ("fail", STAGE_FAILED), ("fail_by_user", BAD_INPUT), ("die", STAGE_FAILED)]
)
def test_resume_passes_on_how_a_run_ends(call: Call, tmp_path: Path, act: str, code: int) -> None:
    assert call("resume", write_run(tmp_path / "r", act).path)[0] == code


def test_a_real_ctrl_c_saves_and_stops(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "train_until_stopped")
    process = spawn("drive", run.path, start_new_session=True)
    wait_for(run.path / "01-sft/metrics.jsonl")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all that are in the foreground hear it
    out, err = process.communicate(timeout=5)
    assert (process.returncode, out) == (INTERRUPTED, "")
    assert "saving and stopping; Ctrl-C again to kill" in err


@pytest.mark.usefixtures("torch_is_there")
def test_a_detached_run_can_be_watched_and_stopped(call: Call, tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "train_until_stopped")
    code, out, _ = call("resume", run.path, "--detach")
    assert code == DONE
    assert out.split() == [
        *("ftlaunch", "status", str(run.path)),
        *("ftlaunch", "logs", "-f", str(run.path)),
        *("ftlaunch", "stop", str(run.path)),
    ]
    code, _, err = call("resume", run.path)
    assert (code, "already running" in err) == (BAD_INPUT, True)
    wait_for(run.path / "01-sft/metrics.jsonl")
    assert json.loads(call("status", run.path, "--json")[1])["state"] == "running"
    assert call("stop", run.path, "--wait", "5")[2] == "r has stopped\n"
    assert "01-sft  saved and stopped" in run.driver_log.read_text()
    assert call("stop", run.path)[0] == BAD_INPUT


@pytest.mark.usefixtures("torch_is_there")
def test_a_stop_right_after_detaching_is_not_lost(call: Call, tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "train_until_stopped")
    call("resume", run.path, "--detach")
    assert call("stop", run.path, "--wait", "5")[2] == "r has stopped\n"


def test_a_detached_driver_outlives_its_callers_session(call: Call, tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "never_leave")
    process = spawn("resume", run.path, "--detach", start_new_session=True)
    assert process.wait(10) == DONE
    wait_for(run.path / "01-sft/ready")
    holder = json.loads(run.lock.read_text())["pid"]
    assert os.getsid(holder) == holder
    call("cancel", run.path)


def test_cancel_ends_driver_and_processes(call: Call, tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "never_leave")
    process = spawn("drive", run.path)
    wait_for(run.path / "01-sft/ready")
    assert call("cancel", run.path)[2] == "r has been ended\n"
    assert process.wait(60) == STOPPED
    process.communicate()
    assert processes.of_attempts(run.path) == []
    assert call("cancel", run.path) == (DONE, "", "r was not running\n")


def test_cancel_ends_what_a_killed_driver_left(call: Call, tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "never_leave")
    process = spawn("drive", run.path)
    wait_for(run.path / "01-sft/ready")
    process.kill()
    process.communicate()
    assert processes.of_attempts(run.path) != []
    assert call("cancel", run.path)[2] == "r has been ended\n"
    assert processes.of_attempts(run.path) == []


def test_a_run_is_cancelled_through_a_link_too(call: Call, tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "never_leave")
    (tmp_path / "link").symlink_to(run.path)
    orphan = leave_behind(run)
    assert call("cancel", tmp_path / "link")[2] == "link has been ended\n"
    assert orphan.wait(5) == -signal.SIGKILL


def test_status_lists_runs_or_shows_one(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("status") == (DONE, "", f"there are no runs below {tmp_path}/runs\n")
    assert call("status", "--json") == (DONE, "[]\n", "")
    run = write_run(tmp_path / "runs/one", "train", "train")
    write_run(tmp_path / "runs/two", "train")
    run.stage_dir("01-sft").result.write_text("{}")
    code, out, _ = call("status")
    assert code == DONE
    assert [line.split()[:3] for line in out.splitlines()] == [
        ["run", "state", "stage"],
        ["one", "waiting", "02-sft"],
        ["two", "waiting", "01-sft"],
    ]
    assert call("status", "one")[1].splitlines()[0] == f"one  waiting  {run.path}"
    code, _, err = call("status", "three")
    assert (code, err) == (BAD_INPUT, "error: there is no run 'three'\n  → there are: one, two\n")


def test_logs_print_what_ranks_said(call: Call, tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "train", "fail")
    assert call("drive", run.path)[0] == STAGE_FAILED
    said = call("logs", run.path, "--stage", "01-sft")[1]
    assert said.splitlines() == [
        "[launch] launched",
        *(f"[rank 0] step {n}" for n in (1, 2, 3)),
        *said.splitlines()[4:],
    ]
    assert (
        call("logs", run.path, "--stage", "01-sft", "--rank", "1")[1] == "[rank 1] hello from 1\n[rank 1] no line end\n"
    )
    assert call("logs", run.path, "--first-error")[1].startswith("error: rank 1: RuntimeError: boom\n")
    assert call("logs", "-f", run.path)[2] == "── 02-sft, attempt 1\n"


def test_ctrl_c_ends_the_following_and_not_the_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "train")
    run.stage_dir("01-sft").new_attempt()
    working = leave_behind(run)
    follower = spawn("logs", "-f", run.path)
    assert follower.stderr is not None
    follower.stderr.readline()
    follower.send_signal(signal.SIGINT)
    follower.communicate(timeout=5)
    assert (follower.returncode, working.poll()) == (DONE, None)
    working.kill()
    working.wait()


def test_logs_into_a_closed_pipe_say_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "train")
    (run.stage_dir("01-sft").new_attempt().path / "rank0.log").write_text("line\n" * 100_000)
    process = spawn("logs", run.path)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.wait(5)


def test_recipes_and_schema_are_machine_readable(call: Call) -> None:
    assert isinstance(json.loads(call("recipes", "--json")[1]), dict)
    assert json.loads(call("schema")[1])["title"] == "ftlaunch recipe"


@pytest.fixture
def called(torch_is_there: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ToolOptions]]:  # noqa: ARG001
    """The options of each tool that is called, by which none is started; their files are gone at the end."""
    found: list[ToolOptions] = []
    files: list[Path] = []

    def act(command: list[str], env: dict[str, str]) -> int:  # noqa: ARG001 as subprocess.call has it
        files.append(Path(command[4]))
        found.append(msgspec.json.decode(files[-1].read_bytes(), type=TOOLS[command[3]]))
        return 3

    monkeypatch.setattr(subprocess, "call", act)
    yield found
    assert not any(file.exists() for file in files)


def test_heavy_verbs_are_the_trainers(call: Call, recipe: Path, called: list[ToolOptions]) -> None:
    (recipe.parent / "m.gguf").touch()
    metrics = ["--metric", "chrf", "--metric", "rouge"]
    lines = (
        ("merge", "adapter", "out", "--dtype", "fp16"),
        ("import", "m.gguf", "model"),
        ("chat", "one", "two", "--prompt", "hi there"),
        ("preview", recipe, "--rows", "5", "--set", "name=other"),
        ("superweights", "model", "--relative", "8", "--ablate"),
        ("quantize", "model", "out", "--bits", "3", "--asymmetric", "--activation-bits", "8", "--protect"),
        ("import", recipe.parent, "model"),
        ("eval", recipe, "model", "--prompts", "3", "--answers", "said.jsonl", "--json", *metrics),
        ("eval", recipe, "model", "--task", "a", "--task", "b", "--task-folder", "mine", "--prompts", "3"),
        ("serve", "model", "--compare", "base", "--allow-host", "a", "--allow-host", "b", "--port", "9"),
    )
    assert [call(*line)[0] for line in lines] == [3] * len(lines)
    previewed, evaluated = called[3], called[7]
    assert isinstance(previewed, PreviewOptions)
    assert isinstance(evaluated, EvaluateOptions)
    assert (previewed.recipe.name, previewed.rows) == ("other", 5)
    assert called == [
        MergeOptions(source=str(Path.cwd() / "adapter"), out="out", dtype="fp16"),
        ImportOptions(source="m.gguf", out="model"),
        ChatOptions(models=["one", "two"], prompt="hi there"),
        previewed,
        SuperweightsOptions(model="model", limits=SpikeLimits(relative=8), ablate=True),
        QuantizeOptions(model="model", out="out", bits=3, asymmetric=True, activation_bits=8, protect=True),
        UnpackOptions(source=str(recipe.parent), out="model"),
        EvaluateOptions(
            recipe=evaluated.recipe,
            models=["model"],
            metrics=("chrf", "rouge"),
            prompts=3,
            answers="said.jsonl",
            json=True,
        ),
        HarnessOptions(models=["model"], tasks=("a", "b"), folder=str(Path.cwd() / "mine"), prompts=3),
        ServeOptions(model="model", compare="base", allow_host=["a", "b"], port=9),
    ]


def test_every_tool_has_a_module_of_the_trainer_that_reads_its_options() -> None:
    for module, kind in TOOLS.items():
        source = Path(__file__).parents[3].joinpath("src", *module.split(".")).with_suffix(".py").read_text()
        assert f"    run(main, {kind.__name__})\n" in source


def test_a_run_stands_for_what_it_made(call: Call, tmp_path: Path, called: list[ToolOptions]) -> None:
    run = write_run(tmp_path / "r", "train", "train")
    code, _, err = call("chat", run.path, "--prompt", "hi")
    assert (code, "has made no model yet" in err) == (BAD_INPUT, True)
    made(run, "01-sft/artifact")
    made(run, "02-sft/model")
    call("chat", run.path, "--prompt", "hi")
    call("merge", run.path, tmp_path / "out")
    assert called == [
        ChatOptions(models=[f"{run.path}/02-sft/model"], prompt="hi"),
        MergeOptions(source=f"{run.path}/01-sft/artifact", out=str(tmp_path / "out")),
    ]


@pytest.mark.usefixtures("torch_is_there")
@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ((), "is a recipe, and has made no model"),
        (("model", "--answers", "none/a.jsonl"), "there is no such folder"),
        (("model", "--answers", "q.jsonl"), "the file exists"),
        (("model", "--task", "a", "--metric", "bleu"), "--metric does not count with --task"),
        (("model", "--task", "a", "--max-new-tokens", "5"), "--max-new-tokens does not count with --task"),
        (("model", "--task", "a", "--resamples", "0"), "--resamples does not count with --task"),
        (("model", "--task-folder", "mine"), "counts only with --task"),
    ],
)
def test_eval_needs_models_and_a_place_for_answers(
    call: Call, recipe: Path, more: tuple[str, ...], problem: str
) -> None:
    code, _, said = call("eval", recipe, *more)
    assert (code, problem in said) == (BAD_INPUT, True)


def made(run: RunDir, what: str) -> None:
    (run.path / what).mkdir()
    (run.path / what).with_name("result.json").write_text("{}")


def test_a_wrong_call_is_a_users_mistake(call: Call) -> None:
    assert call("run")[0] == BAD_INPUT
    assert call("no-such-verb")[0] == BAD_INPUT
    assert call("validate", "no-such-recipe")[0] == BAD_INPUT


def test_the_version_is_the_installed_one(call: Call) -> None:
    assert call("--version") == (DONE, f"ftlaunch {metadata.version('ftlaunch')}\n", "")


REGENERATE = """\
launcher/ftlaunch/help.txt is not what typer says any more. Write it again:
  COLUMNS=80 python -c "from ftlaunch import cli; cli.main()" --help > launcher/ftlaunch/help.txt"""


@pytest.mark.parametrize("line", [(), ("-h",), ("--help",)])
def test_the_help_is_what_typer_would_say(call: Call, monkeypatch: pytest.MonkeyPatch, line: tuple[str, ...]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = call(*line)
    monkeypatch.setattr(cli, "main", __main__.main)
    assert call(*line) == said, REGENERATE


def test_every_verb_shows_an_example(call: Call) -> None:
    group = typer.main.get_command(cli.app())
    verbs = [name for name, command in group.commands.items() if not command.hidden]
    assert len(verbs) == 25
    for verb in verbs:
        assert f"Example: ftlaunch {verb}" in call(verb, "--help")[1]


def test_a_run_folder_with_a_line_break_is_refused(call: Call, recipe: Path) -> None:
    code, _, said = call("plan", recipe, "--run-dir", "a\ntouch CANARY #")
    assert code == BAD_INPUT
    assert "holds control characters" in said


def test_a_full_disk_is_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(**_: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded", "/runs/x/plan.json")

    monkeypatch.setattr(cli, "app", lambda _: write)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: /runs/x/plan.json cannot be written: Disk quota exceeded\n  → ")


@pytest.mark.parametrize(("asked", "imported"), [("status", {"run"}), ("doctor", {"cluster", "options"})])
def test_a_verb_imports_what_it_needs_alone(asked: str, imported: set[str]) -> None:
    code = f"from ftlaunch import cli; cli.app([{asked!r}]); import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = {name.removeprefix("ftlaunch.cli.") for name in done.stdout.split() if name.startswith("ftlaunch.cli.")}
    assert imported <= modules
    assert not modules & {"recipe", "compare", "evaluate", "model", "report", "ship", "watch"}
