"""Recipe → Plan: what will be started, with which files, in which order. Pure: nothing is written or looked up."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct, field

from ftlaunch.plan.chain import Link, is_merged, links
from ftlaunch.recipe.adapter import Adapter
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.recipe.stages import Evaluate, Merge, Training
from ftlaunch.run.spec import StageSpec

if TYPE_CHECKING:
    from ftlaunch.plan.machine import Machine

ON_THE_WAY = (
    *("parallel", "track", "micro_batch_size", "activation_checkpointing", "save_every", "keep", "on_save_failure"),
    *("on_nonfinite", "generation_batch_size", "samples_every", "eval_metrics", "eval_prompts"),
    *("eval_max_new_tokens", "eval_temperature", "eval_beams", "best_by"),
)
"""Keys that a stage may change on its way: how work is shared out, what is also written, what a failure leads to."""
NOT_DECISIVE = (*ON_THE_WAY, "name", "world_size", "accumulation", "merged")
"""Fields of a stage's spec that do not decide its course."""
ADDED_TO_DATA: dict[str, object] = {
    **dict.fromkeys(("preference_field", "best_rating", "eval", "group_by"), None),
    **{"label_field": "label", "template_arguments": {}, "unfit": "drop", "unfit_share": 0.1, "test_by": "row"},
    **{"control_tokens": "refuse"},
}
"""Keys of a data table that earlier versions did not have, with their defaults: left out of the hash where they hold
these, so that runs from before can go on."""
ADDED_TO_STAGES = ("reward_revision",)
"""The same of stages: keys whose default is None."""
TOLD_BY_THE_STEP = ("model", "adapter", "noise", "optimizer", "learning_rate", "start", "reward")
"""Keys of a stage that count as they stand in its step, wherever they came from."""


class PlannedStage(Struct, frozen=True, kw_only=True):
    """One stage, ready to start."""

    name: str
    """Name of its folder: `01-sft`."""
    spec: StageSpec = field(name="step")
    files: dict[str, str]
    """File name → exact content, in the step folder."""
    command: list[str]
    """Argument vector; the working directory is the run folder."""
    env: dict[str, str]
    """Set on top of the caller's environment."""
    notes: dict[str, str]
    """What the stage does, derived values included: a line each, under a label such as "learning rate"."""


class Plan(Struct, frozen=True, kw_only=True):
    """A whole run, ready to start. What is printed is what is submitted."""

    name: str
    run_dir: str
    recipe: Recipe
    stages: list[PlannedStage] = field(name="steps")

    @property
    def specs(self) -> dict[str, StageSpec]:
        """What each stage is, by its name."""
        return {planned.name: planned.spec for planned in self.stages}


def make_plan(recipe: Recipe, run_dir: Path, machine: "Machine | None" = None) -> Plan:
    """Plan a recipe that has passed `rules.check`. `run_dir` is where the run will be, made absolute.

    `machine` is what the run will be on, if that is known; it only decides what is said of it.
    """
    stages = [_plan_stage(name, spec, machine) for name, spec in make_specs(recipe).items()]
    return Plan(name=recipe.name, run_dir=str(run_dir.absolute()), recipe=recipe, stages=stages)


def make_specs(recipe: Recipe) -> dict[str, StageSpec]:
    """What each stage of such a recipe is, by its name."""
    specs: dict[str, StageSpec] = {}
    chain = links(recipe)
    for link in chain:
        # "01-sft/artifact" → "01-sft". A change in an earlier stage thus changes the hash of all that build on it.
        needed = [specs[Path(path).parts[0]].training_hash for path in (link.start, link.reward) if path]
        specs[link.name] = _make_spec(recipe, link, needed, merged=is_merged(chain, link))
    return specs


def _make_spec(recipe: Recipe, link: Link, needed: list[str], *, merged: bool) -> StageSpec:
    stage, world_size = link.stage, link.resolved.parallel.world_size
    micro, accumulation, learning_rate, data = 1, 1, 0.0, {}
    if isinstance(stage, Training):
        micro = stage.micro_batch_size or stage.batch_size // world_size
        accumulation = stage.batch_size // (micro * world_size)
        learning_rate = stage.learning_rate or suitable_rate(stage, link.resolved.adapter)
        data = {name: recipe.data[name] for name in stage.data_names}
    elif isinstance(stage, Evaluate):
        data = {stage.data: recipe.data[stage.data]}
    spec = StageSpec(
        name=recipe.name,
        stage=stage,
        **msgspec.structs.asdict(link.resolved),
        track=recipe.track,
        data=data,
        seed=recipe.seed,
        deterministic=recipe.deterministic,
        world_size=world_size,
        micro_batch_size=micro,
        accumulation=accumulation,
        learning_rate=learning_rate,
        start=link.start,
        reward=link.reward,
        merged=merged,
        training_hash="",
    )
    return msgspec.structs.replace(spec, training_hash=_training_hash(spec, needed))


def suitable_rate(stage: Training, adapter: Adapter) -> float:
    """The peak learning rate of a stage whose recipe names none."""
    # Three digits: a product such as 0.0003 × 0.1 is 2.9999999999999997e-05 in floats.
    return float(f"{stage.lora_rate * adapter.rate:.3g}")


def _training_hash(spec: StageSpec, needed: list[str]) -> str:
    """Return SHA-256 of what decides a stage's course: its spec but NOT_DECISIVE, and the hashes of what it needs."""
    read_back = msgspec.json.decode(
        msgspec.json.encode(spec), type=StageSpec
    )  # a float written as 16 is 16.0 after this, so both spellings have one hash
    course = msgspec.to_builtins(read_back)
    # Keys such as micro_batch_size stand in both: as the recipe has them, and as they count.
    for table in (course, course["stage"]):
        for key in NOT_DECISIVE:
            table.pop(key, None)
    absent = [key for key in ADDED_TO_STAGES if course["stage"].get(key) is None]
    for key in (*TOLD_BY_THE_STEP, *absent):
        course["stage"].pop(key, None)
    if isinstance(spec.stage, Merge):
        course["stage"]["max_kl"] = None  # the tolerance of the check changes no weight
    for table in course["data"].values():
        for key in [key for key, default in ADDED_TO_DATA.items() if table[key] == default]:
            del table[key]
        del table["unread"]  # it changes no row
        if table["overlong"] is None and table["format"] != "text":
            table["overlong"] = "truncate"
    if course["adapter"].get("experts") is False:  # newer than some runs: its default must not change their hash
        del course["adapter"]["experts"]
    return hashlib.sha256(msgspec.json.encode([course, needed], order="sorted")).hexdigest()


def _plan_stage(name: str, spec: StageSpec, machine: "Machine | None") -> PlannedStage:
    # `status` and `validate` should not wait for what only makes plans.
    from ftlaunch.plan import describe, launch_config

    files = {"step.json": msgspec.json.format(msgspec.json.encode(spec), indent=2).decode() + "\n"}
    files["accelerate.yaml"] = launch_config.accelerate_yaml(spec, name)
    deepspeed = launch_config.deepspeed_json(spec)
    if deepspeed is not None:
        files["deepspeed.json"] = deepspeed
    return PlannedStage(
        name=name,
        spec=spec,
        files=files,
        command=launch_config.command(name),
        env=launch_config.environment(spec.parallel),
        notes=describe.of_step(spec, machine),
    )
