"""`python -m tests.zoo [FAMILY …]`: every family through every stage; without names it writes recipes/MODELS.md.

All in this process, with default settings: LoRA on all linear layers, packing and shared prompts on.
"""

import json
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tests.trainer.in_process import make_data, make_step, train
from tests.zoo import faith
from tests.zoo.families import FAMILIES, build

from ftlaunch.errors import UserError
from ftlaunch.recipe import Data, Dpo, Merge, Ppo, Reward
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import StageDir
from fttrain.data.token_set import Group
from fttrain.merging.merge import find_source, merge

PAGE = Path(__file__).parents[2] / "recipes" / "MODELS.md"
HEADER = """# Models

Made by `make zoo` from tiny random models of each family, in fp32 on a CPU; do not edit. A family that is not here is
tried by the same probe when its stage starts: before the first step, rows as training lays them down are compared with
the model's own forward pass, one by one. What is not the same goes on in a slower layout that is, or ends there.

- **rows**: packed (end to end, prompts of pairs shared), padded, or alone (each computed by itself), as the probe chose
- **exact**: every token's log-probability and the gradient's norm are those of plain transformers, row by row
- **SFT, DPO, reward, PPO, merge**: ✓ it ran with default settings (LoRA on all linear layers), DPO began at ln 2, the
  merge is like the adapter model; else the number of the reason below

| family | rows | exact | SFT | DPO | reward | PPO | merge |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
ROWS = [
    ("what is red", "a lamp and a kettle of green salt"),
    ("say", "no"),
    ("tell me all of the blue kettle that stood upon the table", "it was blue, and there was tea in it"),
    ("who", "the cook with a red hat"),
]
REWARDS = "def early(prompt, answer, row):\n    return sum(letter < 'n' for letter in answer) / 3\n"
SAME_LN_2 = 1e-4


class Tried:
    """One family, trial by trial, each in a folder of its own."""

    def __init__(self, name: str, scratch: Path) -> None:
        self._scratch = scratch
        self._model = build(name, scratch / "model")
        self._rows, self._pairs, self._rewards = _data(scratch)
        self.rows = "–"

    def exact(self) -> None:
        rows = faith.rows()
        groups = [Group((row,)) for row in rows]
        expected = faith.plain(self._model, rows)
        if not faith.trained(self._model, groups, packing=self.rows == "packed", alone=self.rows == "alone").is_same(
            expected
        ):
            raise ValueError("it is not what plain transformers computes")

    def sft(self) -> None:
        done = self._train("sft", make_data(self._rows))
        self.rows = json.loads(done.result.read_text())["probe"]["layout"]
        self._artifact = done.artifact

    def dpo(self) -> None:
        done = self._train("dpo", self._paired(), kind=Dpo)
        first = next(line["loss"] for line in read_jsonl(done.metrics) if "loss" in line)
        if abs(first - 0.693147) > SAME_LN_2:
            raise ValueError(f"DPO begins at {first:.4f}, not at ln 2")

    def reward(self) -> None:
        self._train("reward", self._paired(), kind=Reward)

    def ppo(self) -> None:
        rewards = f"{self._rewards}:early"
        sizes = {"rollout_size": 4, "ppo_epochs": 1, "max_new_tokens": 4, "reward_function": rewards}
        self._train("ppo", make_data(self._rows, completion=None), kind=Ppo, **sizes)

    def merge(self) -> None:
        merge(find_source(self._artifact), self._scratch / "merged", Merge())

    def _paired(self) -> Data:
        return Data(path=str(self._pairs), format="preference")

    def _train(self, name: str, data: Data, **stage: Any) -> StageDir:
        (folder := self._scratch / name).mkdir()
        return train(make_step(self._model, data, **{"steps": 2, "batch_size": 4, "save_every": 100, **stage}), folder)


def _data(folder: Path) -> tuple[Path, Path, Path]:
    rows, pairs, rewards = folder / "rows.jsonl", folder / "pairs.jsonl", folder / "rewards.py"
    rows.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in ROWS))
    pairs.write_text("".join(json.dumps({"prompt": q, "chosen": a, "rejected": "rain"}) + "\n" for q, a in ROWS))
    rewards.write_text(REWARDS)
    return rows, pairs, rewards


def _said(trial: Callable[[], None]) -> str:
    """Return "✓", or why not: a refusal's message, or the error that nobody has foreseen."""
    try:
        trial()
    except UserError as error:
        return error.message
    except Exception as error:  # noqa: BLE001 the page tells it
        traceback.print_exc()
        return f"error: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    return "✓"


def tried(name: str) -> list[str]:
    """The family's cells: its rows, then what each trial said."""
    scratch = Path(tempfile.mkdtemp(prefix="zoo-"))
    try:
        one = Tried(name, scratch)
        trained = _said(one.sft)
        exact = _said(one.exact)
        others = [_said(trial) for trial in (one.dpo, one.reward, one.ppo)]
        merged = _said(one.merge) if trained == "✓" else "–"
        return [one.rows, exact, trained, *others, merged]
    finally:
        shutil.rmtree(scratch)


def page(families: Sequence[str]) -> str:
    """The page, with the reasons below the table, each once."""
    reasons: dict[str, int] = {}
    lines = []
    for name in families:
        rows, *said = tried(name)
        cells = [one if one in ("✓", "–") else str(reasons.setdefault(one, len(reasons) + 1)) for one in said]
        lines.append(f"| {' | '.join([name, rows, *cells])} |")
        print(lines[-1], file=sys.stderr, flush=True)
    told = "".join(f"{number}. {' '.join(reason.split())}\n" for reason, number in reasons.items())
    return HEADER + "\n".join(lines) + (f"\n\n## Why not\n\n{told}" if told else "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = page(sys.argv[1:] or list(FAMILIES))
    print(made) if sys.argv[1:] else PAGE.write_text(made)
