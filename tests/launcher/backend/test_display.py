"""What a person sees while a stage runs."""

import os
import pty
import sys
from io import StringIO

import pytest

from ftlaunch.backend.display import BarDisplay, PlainDisplay, open_display
from ftlaunch.run.progress import Entry, describe, duration, seconds_left


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def entry(step: int, steps: int = 100) -> Entry:
    return {"step": step, "steps": steps, "loss": 1.5, "tokens_per_second": 1234.5, "time": 10.0 * step}


def shown(clock: Clock, *batches: tuple[float, list[Entry]]) -> list[str]:
    """Lines that a plain display writes for entries that come after so many seconds each."""
    stream = StringIO()
    display = PlainDisplay(stream, clock)
    with display.stage("01-sft"):
        for wait, entries in batches:
            clock.now += wait
            display.show(entries)
    return stream.getvalue().splitlines()


def test_an_entry_in_a_line() -> None:
    assert describe(entry(20), 3723.0) == "step 20/100  loss 1.5000  1,234 tokens/s  1:02:03 left"
    assert describe({"step": 2, "eval/loss": 0.25, "eval/perplexity": 1.284, "time": 1.0}, None) == (
        "step 2  eval/loss 0.25  eval/perplexity 1.284"
    )
    assert duration(59.6) == "1:00"


def test_time_left_needs_two_steps() -> None:
    assert seconds_left([]) is None
    assert seconds_left([entry(1)]) is None
    assert seconds_left([entry(1), entry(3)]) == 970.0


def test_fast_steps_are_shown_by_tens_and_not_more_than_one_a_second() -> None:
    lines = shown(Clock(), *((0.2, [entry(step)]) for step in range(1, 101)))
    steps = [int(line.split()[2].partition("/")[0]) for line in lines]
    assert steps == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]
    hasty = shown(Clock(), *((0.01, [entry(step, 1000)]) for step in range(1, 500)))
    assert len(hasty) == 5


def test_slow_steps_are_shown_each() -> None:
    assert len(shown(Clock(), *((11.0, [entry(step)]) for step in range(1, 6)))) == 5


def test_rows_that_are_prepared_are_told_now_and_then() -> None:
    stream, clock = StringIO(), Clock()
    display = PlainDisplay(stream, clock)
    with display.stage("01-sft"):
        for rows in range(100):
            clock.now += 0.1
            display.prepare(f"{rows} rows")
    lines = stream.getvalue().splitlines()
    assert all(line.startswith("01-sft  ") and line.endswith(" rows") for line in lines)
    assert 1 <= len(lines) <= 12


def test_the_first_the_last_and_evaluations_are_always_shown() -> None:
    evaluation = {"step": 2, "eval/loss": 0.5}
    lines = shown(Clock(), (0.0, [entry(1, 3), entry(2, 3), evaluation, entry(3, 3)]))
    assert lines == [
        "01-sft  step 1/3  loss 1.5000  1,234 tokens/s",
        "01-sft  step 2  eval/loss 0.5",
        "01-sft  step 3/3  loss 1.5000  1,234 tokens/s  0:00 left",
    ]


def test_a_reader_that_leaves_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    silenced: list[bool] = []
    monkeypatch.setattr("ftlaunch.backend.display.detach_output", lambda: silenced.append(True))
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as stream:
        display = PlainDisplay(stream)
        display.say("hello")
        monkeypatch.setattr(stream, "close", lambda: None, raising=False)
    assert silenced == [True]


def test_a_terminal_gets_a_bar_and_a_log_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(open_display(StringIO()), PlainDisplay)
    main, other = pty.openpty()
    with os.fdopen(other, "w") as terminal:
        assert isinstance(open_display(terminal), BarDisplay)
        monkeypatch.setenv("TERM", "dumb")
        assert isinstance(open_display(terminal), PlainDisplay)
    os.close(main)


def test_the_bar_shows_the_newest_step_and_keeps_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    main, other = pty.openpty()
    with os.fdopen(other, "w") as terminal:
        display = BarDisplay(terminal)
        with display.stage("01-sft"):
            display.show([entry(1), {"step": 1, "eval/loss": 0.5}, entry(2)])
        display.say("01-sft  done in 0:03")
    seen = read_all(main)
    assert "01-sft  step 1  eval/loss 0.5" in seen
    assert "step 2/100  loss 1.5000" in seen
    assert "01-sft  done in 0:03" in seen
    assert seen.endswith("\x1b[2K01-sft  done in 0:03\r\n"), "the bar has not made way"
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h")


def read_all(descriptor: int) -> str:
    text = b""
    try:
        while piece := os.read(descriptor, 65536):
            text += piece
    except OSError:
        os.close(descriptor)  # a terminal's end is an error on Linux
    return text.decode()


def test_rich_is_loaded_for_a_bar_only() -> None:
    import subprocess

    code = "import sys; from ftlaunch.backend.display import PlainDisplay; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
