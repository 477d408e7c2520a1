"""How a run ends that cannot go on: soon, on all ranks, and with the first cause in so many words."""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Launch
from transformers import AutoTokenizer

from ftlaunch.errors import BAD_INPUT, STAGE_FAILED
from ftlaunch.run.layout import RunDir

DDP = ["--set", "parallel.strategy=ddp", "--set", "parallel.procs_per_node=2"]
BREAK_RANK_1 = """
import os
if os.environ.get("RANK") == "1":
    from fttrain.training.optim import Schedule
    rate = Schedule.__call__
    def broken(self, step):
        if step == 3:
            raise RuntimeError("the lamp has gone out")
        return rate(self, step)
    Schedule.__call__ = broken
"""


def test_a_rank_that_raises_ends_its_peers_and_is_named(
    tmp_path: Path, recipe: Callable[..., Path], launch: Launch, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "sitecustomize.py").write_text(BREAK_RANK_1)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    run = RunDir(tmp_path / "run")
    done = launch("run", recipe(), *DDP, "--run-dir", run.path, check=False)
    ended = time.time()
    assert done.returncode == STAGE_FAILED, done.stdout + done.stderr
    (attempt,) = run.stage_dir("01-sft").all_attempts()
    error = json.loads(attempt.error.read_text())
    assert ended - attempt.error.stat().st_mtime < 20
    assert (error["rank"], error["type"], error["message"]) == (1, "RuntimeError", "the lamp has gone out")
    assert "in broken" in error["traceback"]
    assert "fttrain/training/loop.py" in error["traceback"]
    assert error["log"] == str(attempt.rank_log(1))
    assert not error["user_error"]
    assert "error: rank 1: RuntimeError: the lamp has gone out" in done.stderr
    assert not run.stage_dir("01-sft").result.exists()


def test_a_users_mistake_found_in_training_is_shown_with_its_remedy(
    tmp_path: Path, recipe: Callable[..., Path], tiny_model: Path, launch: Launch
):
    """Each rank looks at the template before it waits for rows; the one that is first to see it is named."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(model)
    (model / "chat_template.jinja").unlink()
    run = RunDir(tmp_path / "run")
    done = launch("run", recipe(), *DDP, "--set", f"model.path={model}", "--run-dir", run.path, check=False)
    assert done.returncode == BAD_INPUT, done.stdout + done.stderr
    assert re.search(
        r"error: rank [01]: the tokenizer has no chat template of its own\n  → set template = ", done.stderr
    )
    assert "Traceback" not in done.stdout + done.stderr
    (attempt,) = run.stage_dir("01-sft").all_attempts()
    assert json.loads(attempt.error.read_text())["user_error"]
