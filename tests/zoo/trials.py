"""One family of models, trial by trial. A trial returns nothing where all is right, and raises what is not.

Stages run in this process with the specs that the plan of a recipe has, except for those of two ranks.
"""

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path

from tests.faults.ranks import Ranks, write_run
from tests.faults.test_kills import outcome
from tests.trainer.in_process import train
from tests.zoo import faith
from tests.zoo.families import build

from ftlaunch.errors import UserError
from ftlaunch.load import load_recipe
from ftlaunch.plan import family
from ftlaunch.plan.cost import body
from ftlaunch.recipe.adapter import Lora
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.recipe.stages import Merge
from ftlaunch.rules import find_problems
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import StageDir
from ftlaunch.run.spec import StageSpec
from fttrain.data.token_set import Group
from fttrain.distributed.stop_request import StoppedEarly
from fttrain.merging.merge import find_source, merge

RECIPE = """
name = "zoo"
seed = 7
[model]
path = "{folder}/model"
dtype = "fp32"
[adapter]
kind = "lora"
rank = 4
alpha = 8
[data.rows]
path = "{folder}/{data}
[[stage]]
kind = "{kind}"
data = "rows"
steps = 2
batch_size = 4
learning_rate = 1e-2
save_every = 1
{more}
[parallel]
device = "cpu"
"""
DATA = {
    "sft": 'rows.jsonl"\nprompt = "{question}"\ncompletion = "{answer}"',
    "ppo": 'rows.jsonl"\nprompt = "{question}"',
    **dict.fromkeys(("dpo", "reward"), 'pairs.jsonl"\nformat = "preference"'),
}
PPO = """
max_new_tokens = 4
rollout_size = 4
ppo_epochs = 1
reward_function = "{folder}/rewards.py:early"
"""
ROWS = [
    ("what is red", "a lamp and a kettle of green salt"),
    ("say", "no"),
    ("tell me all of the blue kettle that stood upon the table", "it was blue, and there was tea in it"),
    ("who", "the cook with a red hat"),
]
REWARDS = "def early(prompt, answer, row):\n    return sum(letter < 'n' for letter in answer) / 3\n"
CLOSE = 1e-4
"""Two losses, in nats, or two gradient norms in relation to their size, that count as the same."""


class Trials:
    """The trials of one family, in a folder of its own."""

    def __init__(self, name: str, folder: Path, ranks: Ranks) -> None:
        self._folder, self._ranks = folder, ranks
        self.model = build(name, folder / "model")
        pairs = [{"prompt": q, "chosen": a, "rejected": "rain"} for q, a in ROWS]
        _write(folder / "rows.jsonl", [{"question": q, "answer": a} for q, a in ROWS])
        _write(folder / "pairs.jsonl", pairs)
        (folder / "rewards.py").write_text(REWARDS)
        self.layout = "–"
        """Of rows: packed, padded or alone, as the probe chose."""
        self._body = body.read(str(self.model))

    def of_columns(self) -> dict[str, Callable[[], None]]:
        """The trials by the page's columns, in the order in which they have to be made."""
        return {
            "SFT": self.sft,
            "plan": self.plan,
            "exact": self.exact,
            "shared prompts": self.shared_prompts,
            "padded": self.padded,
            "DPO": self.dpo,
            "reward": self.reward,
            "PPO": lambda: self._done("ppo", "ppo", more=PPO.format(folder=self._folder)),
            "full": lambda: self._done("full", "sft", "adapter.kind=full"),
            "experts": self.experts,
            "nf4": lambda: self._done("nf4", "sft", "model.quantization=nf4"),
            "merge": self.merge,
            "resume": lambda: self._resume(self._calm),
            "2 ranks": lambda: self._two_ranks(self._calm),
        }

    @property
    def adapted(self) -> float:
        """Share of the body's weights that LoRA on all linear layers is on, as the plan tells it."""
        return (self._body and self._body.adapted_share(Lora())) or 0.0

    @property
    def has_experts(self) -> bool:
        return bool(self._body and self._body.experts)

    def sft(self) -> None:
        self._calm = self._done("sft", "sft")
        self.layout = json.loads(self._calm.result.read_text())["probe"]["layout"]

    def plan(self) -> None:
        """The plan foretells from config.json how rows lie."""
        longest = max(data.max_length for data in self._calm.read_spec().data.values())
        found = family.layout(self.model, longest)
        foretold = "packed" if found is None else "alone" if found.rows == family.ALONE else "padded"
        _require(foretold == self.layout, f"the plan says {foretold}, and the start chose {self.layout}")

    def exact(self) -> None:
        """Every token's log-probability and the gradient's norm are those of plain transformers, row by row."""
        rows = faith.rows()
        self._expected = faith.plain(self.model, rows)
        found = faith.trained(self.model, _single(rows), packing=self.layout == "packed", alone=self.layout == "alone")
        _require(found.is_same(self._expected), "it is not what plain transformers computes")

    def shared_prompts(self) -> None:
        if self.layout != "packed":
            raise NotApplicable
        pairs = faith.pairs()
        expected = faith.plain(self.model, [row for group in pairs for row in group.rows])
        found = faith.trained(self.model, pairs, packing=True, share=True)
        _require(found.is_same(expected), "shared prompts are not what plain transformers computes")

    def padded(self) -> None:
        if self.layout == "alone":
            raise NotApplicable
        found = faith.trained(self.model, _single(faith.rows()), packing=False)
        _require(found.is_same(self._expected), "padded rows are not what plain transformers computes")

    def dpo(self, *settings: str) -> None:
        first = _course(self._done(f"dpo{len(settings)}", "dpo", *settings))[0][0]
        _require(abs(first - math.log(2)) <= CLOSE, f"DPO begins at {first:.4f}, not at ln 2")

    def experts(self) -> None:
        """Their adapters are merged, resumed and sharded as others are, and a reference without them is the base."""
        if not self.has_experts:
            raise NotApplicable
        asked = "adapter.experts=true"
        calm = self._done("experts", "sft", asked)
        merge(find_source(calm.artifact), self._folder / "experts-merged", Merge())
        self._resume(calm, asked)
        self._two_ranks(calm, asked)
        self.dpo(asked)

    def reward(self) -> None:
        """It is merged into a sequence classifier that has its rewards."""
        merge(find_source(self._done("reward", "reward").artifact), self._folder / "reward-merged", Merge())

    def merge(self) -> None:
        """Its logits are the adapter model's, up to rounding."""
        merge(find_source(self._calm.artifact), out := self._folder / "merged", Merge())
        found, rounding = faith.apart(self.model, self._calm.artifact, out)
        _require(
            found <= max(faith.MERGED, rounding), f"a logit is {found:.1e} off, and fp32 moves it by {rounding:.1e}"
        )

    def _resume(self, calm: StageDir, *settings: str) -> None:
        """A stage that is stopped after a step and goes on ends with the very bits of one that was left alone."""
        spec, folder = self._written(f"resumed{len(settings)}", "sft", *settings)
        with contextlib.suppress(StoppedEarly):
            train(spec, folder, stop_after=1)
        _require(outcome(train(spec, folder)) == outcome(calm), "it does not go on as it would have")

    def _two_ranks(self, calm: StageDir, *settings: str) -> None:
        """Two ranks under ZeRO-3 have the losses and gradient norms of one."""
        recipe = self._recipe("sft", *settings, "parallel.strategy=zero3", "parallel.procs_per_node=2")
        stage_dir = write_run(recipe, self._folder / f"zero{len(settings)}").stage_dir("01-sft")
        self._ranks.start(stage_dir)
        if any(self._ranks.wait()):
            raise RanksFailed(json.loads(stage_dir.all_attempts()[-1].error.read_text())["message"])
        for (loss, norm), (other, its_norm) in zip(_course(calm), _course(stage_dir), strict=True):
            same = abs(loss - other) <= CLOSE and abs(norm - its_norm) <= CLOSE * max(norm, 1)
            _require(
                same, f"two ranks have the loss {other:.6f} and the norm {its_norm:.6f}, one {loss:.6f}, {norm:.6f}"
            )

    def _done(self, name: str, kind: str, *settings: str, more: str = "") -> StageDir:
        return train(*self._written(name, kind, *settings, more=more))

    def _written(self, name: str, kind: str, *settings: str, more: str = "") -> tuple[StageSpec, Path]:
        run = write_run(self._recipe(kind, *settings, more=more), self._folder / name)
        return run.stage_dir(f"01-{kind}").read_spec(), run.path

    def _recipe(self, kind: str, *settings: str, more: str = "") -> Recipe:
        """Raises UserError with the first problem that `validate` finds."""
        path = self._folder / "recipe.toml"
        path.write_text(RECIPE.format(folder=self._folder, kind=kind, data=DATA[kind], more=more))
        loaded = load_recipe(path, settings)
        for problem in find_problems(loaded):
            raise UserError(f"validate: {problem.key}: {problem.message}", problem.remedy)
        return loaded.recipe


class NotApplicable(Exception):
    """The family has nothing that this trial is about."""


class RanksFailed(Exception):
    """What the first rank said."""


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _single(rows: list[faith.Tokens]) -> list[Group]:
    return [Group((row,)) for row in rows]


def _course(stage_dir: StageDir) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in read_jsonl(stage_dir.metrics) if "loss" in line]


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise ValueError(why)
