"""The screen of `ftlaunch watch`: stages with what was measured and said, over cuts, kills and resumes."""

import io
import json
import math
import time
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from tests.launcher.scripted_runs import write_run

from ftlaunch.cli import watch
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import RunDir, StageDir
from ftlaunch.watch.screen import RunTail, StageTail, last_line, screen, sparkline, stage_lines
from ftlaunch.watch.status import read_all


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return write_run(tmp_path / "r", "train", "train")


def first(run: RunDir) -> StageDir:
    return run.stage_dir("01-sft")


def line(step: int, loss: float | None = 1.0, **more: object) -> dict[str, object]:
    return {"step": step, "steps": 9, "loss": loss, "tokens_per_second": 50.0, "time": 100.0 + step, **more}


def write(folder: StageDir, *lines: dict[str, object]) -> None:
    folder.metrics.write_text("".join(json.dumps(one) + "\n" for one in lines))


def shown(run: RunDir, tail: RunTail | None = None) -> str:
    tail = tail or RunTail(run)
    tail.read()
    console = Console(file=io.StringIO(), width=110, markup=False)
    with console.capture() as captured:
        console.print(screen(read_all([run]), [tail]))
    return captured.get()


def test_a_stage_is_shown_with_all_that_is_measured(run: RunDir) -> None:
    more = {"peak_memory_bytes": 2e9, "learning_rate": 1e-4, "grad_norm": 0.5}
    write(first(run), line(1, 3.0), line(2, 2.0), line(3, 1.25, **more), {"step": 3, "eval/loss": 0.75, "time": 1.0})
    text = shown(run)
    for words in (
        "01-sft",
        "step 3/9",
        "█▄▁",
        "loss 1.2500",
        "50 tokens/s",
        "2.00 GB",
        "rate 0.0001",
        "eval/loss 0.75",
    ):
        assert words in text, words


def test_each_rank_is_shown_while_a_stage_runs(run: RunDir) -> None:
    attempt = first(run).new_attempt()
    write(first(run), line(1), line(2))
    told = {"step": 2, "seconds": [0.25, 0.5], "whole": 1.0, "hosts": ["n1", "n2"]}
    write_json(attempt.pace, told)
    (status,) = read_all([run])
    stage = msgspec.structs.replace(status.stages[0], state="running")
    tail = StageTail(first(run))
    assert "work at a step: 0.25 s by rank 0 on n1, 0.50 s by rank 1 on n2" in stage_lines(stage, tail)
    write_json(attempt.pace, told | {"seconds": [0.25, *[0.5] * 15], "hosts": ["n1"] * 16})
    assert "16 ranks work 0.25 to 0.50 s at a step" in stage_lines(stage, tail)
    assert not [one for one in stage_lines(status.stages[0], tail) if "at a step" in one]


def test_before_the_first_step_the_last_words_of_rank_0_are_shown(run: RunDir) -> None:
    attempt = first(run).new_attempt()
    attempt.rank_log(0).write_text(
        "Tokenizing rows\nLoading 10%\rLoading 20%\n\n/x/y.py:7: FutureWarning: z\n  warnings.warn(\n"
        "/x/y.py:9: UserWarning: w\n  model = wrap(model)\n"
        'Thread 0x00007f (most recent call first):\n  File "<frozen runpy>", line 198 in _run\n'
    )
    assert last_line(first(run)) == "Loading 20%"
    attempt.error.write_text('{"rank": 1, "type": "E", "message": "out of memory", "log": "l"}')
    text = shown(run)
    assert "rank 1: out of memory" in text
    assert "rank 0 said: Loading 20%" in text


def test_steps_that_are_taken_again_are_shown_once(run: RunDir) -> None:
    folder = first(run)
    tail = StageTail(folder)
    write(folder, *(line(step) for step in range(1, 7)))
    tail.read()
    write(folder, line(1), line(2))  # cut back to the checkpoint of step 2, and gone on from there
    tail.read()
    with folder.metrics.open("a") as file:
        file.write('{"step": 3, "lo')
    tail.read()
    with folder.metrics.open("a") as file:
        file.write("\n" + json.dumps(line(3, 5.0)) + "\n" + json.dumps(line(4, 4.0)) + "\n")
    tail.read()
    assert [(entry["step"], entry["loss"]) for entry in tail.steps] == [(1, 1.0), (2, 1.0), (3, 5.0), (4, 4.0)]


def test_the_newest_sample_is_shown_in_one_line(run: RunDir) -> None:
    write(first(run), line(9))
    drawn = [{"step": step, "prompt": "Who?", "answer": f"\x1b[2JI, {step}\n  " * 30, "reward": 0.5} for step in (1, 9)]
    first(run).samples.write_text("".join(json.dumps(one) + "\n" for one in drawn) + '{"step": 9, "pro')
    words = " ".join(shown(run).split())
    assert "sample: Who? → [2JI, 9 [2JI, 9" in words
    assert "…  (step 9, reward 0.5)" in shown(run)
    said = {"prompt": "What?", "references": ["b"], "answers": {"trained": "a", "base": "b"}}
    run.stage_dir("02-sft").predictions.write_text(json.dumps(said) + "\n")
    assert "sample: What? → a" in shown(run)


def test_steps_left_out_and_losses_that_are_not_finite_are_said(run: RunDir) -> None:
    write(first(run), line(1, 1.0), line(2, None, skipped=1))
    text = shown(run)
    assert "loss not finite" in text
    assert "1 steps left out" in text


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], ""), ([1.0], "▁"), ([0.0, 7.0], "▁█"), ([0.0, math.nan, 1.0], "▁ █"), ([2.0, 2.0], "▁▁")],
)
def test_a_sparkline(values: list[float], expected: str) -> None:
    assert sparkline(values) == expected
    assert len(sparkline(values * 1000, 10)) <= 10


def test_what_is_not_a_terminal_is_shown_once(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.path.parent)
    watch.watch([str(run.path)])
    assert "01-sft" in capsys.readouterr().out
    watch.watch(None)
    assert "no run below" in capsys.readouterr().err


def test_watching_goes_on_until_the_run_is_over(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that starts, is killed, goes on and ends while it is watched."""
    from ftlaunch.processes import lock

    held = lock.take(run)
    acts = iter(
        [
            lambda: write(first(run), line(1, 3.0), line(2, 2.0)),
            lambda: write(first(run), line(1, 3.0)),
            lambda: write(first(run), line(1, 3.0), line(2, 1.5)),
            lambda: lock.release(held),
        ]
    )
    monkeypatch.setattr(time, "sleep", lambda _: next(acts)())
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=True, color_system=None, markup=False)
    watch._follow(console, [RunTail(run)])
    assert "step 2/9" in stream.getvalue().rpartition("01-sft")[2]
    assert "loss 1.5000" in stream.getvalue().rpartition("01-sft")[2]
