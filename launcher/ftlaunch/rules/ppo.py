"""Rules of PPO stages: where rewards come from, and what its keys ask of each other."""

import ast
import json
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from ftlaunch.errors import Problem
from ftlaunch.load import Loaded
from ftlaunch.load.messages import as_toml, did_you_mean, join_or
from ftlaunch.load.paths import is_file
from ftlaunch.plan.resolve import ResolvedStage
from ftlaunch.recipe.adapter import Full
from ftlaunch.recipe.names import is_local
from ftlaunch.recipe.noise import replaces
from ftlaunch.recipe.stages import SHIPPED_REWARDS, Ppo, Stage
from ftlaunch.rules.compatibility.axes import PLAIN
from ftlaunch.rules.stage import TrainedStage, trainings

FORM = '"FILE.py:NAME" or "package.module:NAME"'


class PpoStage(TrainedStage, frozen=True):
    """A PPO stage of a recipe."""

    stage: Ppo


def ppo_stages(loaded: Loaded) -> Iterator[PpoStage]:
    """The recipe's PPO stages."""
    for training in trainings(loaded):
        if isinstance(training.stage, Ppo):
            yield PpoStage(loaded, training.whole, training.stage)


def there_is_one_reward(ppo: PpoStage) -> Iterator[Problem]:
    function, model = ppo.stage.reward_function, ppo.stage.reward_model
    before = ppo.whole.reward
    if function is not None and model is not None:
        yield ppo.problem("reward_model", "is given together with reward_function", "keep the one that is meant")
    elif function is None and model is None and before is None:
        remedy = 'add reward_function = "…" or reward_model = "…", or put a stage with kind = "reward" before it'
        yield ppo.problem("reward_function", "is missing: nothing says how good an answer is", remedy)


def reward_stage_is_used(ppo: PpoStage) -> Iterator[Problem]:
    before = ppo.whole.reward
    for key in ("reward_function", "reward_model"):
        if before is not None and getattr(ppo.stage, key) is not None:
            message = "is given, and so is a reward stage before it, which would be trained for nothing"
            yield ppo.problem(key, message, "keep the one that is meant")


def reward_stage_is_on_the_policy_s_base(ppo: PpoStage) -> Iterator[Problem]:
    """A reward model that is an adapter is loaded next to the policy's, over the same base."""
    policy, reward = ppo.whole, ppo.whole.reward
    if reward is None or isinstance(policy.tables.adapter, Full) or isinstance(reward.tables.adapter, Full):
        return
    if _maker_of_base(policy) is not _maker_of_base(reward):
        message = "has its reward model from a stage with another adapter, which is trained over another base"
        yield ppo.problem("adapter", message, "give the reward stage the adapter of the stages that it starts from")


def _maker_of_base(one: ResolvedStage) -> Stage | None:
    """Return the stage that has made the base which a stage trains over, in full or by a merge; None if nobody has."""
    while one.before is not None:
        if one.begins_on_merge or isinstance(one.before.tables.adapter, Full):
            return one.before.stage
        one = one.before
    return None


def function_is_there(ppo: PpoStage) -> Iterator[Problem]:
    name = ppo.stage.reward_function
    found = None if name is None or name in SHIPPED_REWARDS else _look_for(name)
    if found is not None:
        yield ppo.problem("reward_function", *found)


def _look_for(name: str) -> tuple[str, str] | None:
    """(message, remedy) where the function that a name stands for is not found. Nothing is imported."""
    place, colon, function = name.rpartition(":")
    if not colon:
        shipped = join_or(map(as_toml, SHIPPED_REWARDS))
        remedy = did_you_mean(name, SHIPPED_REWARDS, f"write {FORM}, or {shipped}, which is shipped")
        return f"{as_toml(name)} is no function", remedy
    path = Path(place) if place.endswith(".py") else _file_of(place)
    if path is None:
        remedy = f"install it, or write the path of a file: {FORM}"
        return f"there is no module {as_toml(place)} that the trainer could import", remedy
    # The names in a compiled module are seen only by importing it, which the trainer does. A file that is not there has
    # been told as a path.
    if path.suffix != ".py" or not is_file(path):
        return None
    names = _names_in(path)
    if isinstance(names, str):
        return f"{path} is not Python: {names}", "correct the file"
    if function in names:
        return None
    return f"{path} has no function {as_toml(function)}", did_you_mean(function, names, f"define it there: {FORM}")


def _file_of(module: str) -> Path | None:
    """Where a module lies, found without importing the packages around it."""
    spec: ModuleSpec | None = None
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        places = sys.path if spec is None else spec.submodule_search_locations
        # importlib.util.find_spec would import the packages on the way, with whatever they run.
        spec = PathFinder.find_spec(".".join(parts[:depth]), places)
        if spec is None:
            return None
    return Path(spec.origin) if spec is not None and spec.origin else None


def _names_in(path: Path) -> list[str] | str:
    """What a file's top level defines, assigns or imports; why it cannot be read, where it cannot."""
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError) as error:
        return str(error)
    names: list[str] = []
    for node in body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.append(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names += [alias.asname or alias.name for alias in aliases]
            # A reward may be any object that can be called, such as a partial.
            case ast.Assign(targets=targets):
                names += [target.id for target in targets if isinstance(target, ast.Name)]
            case _:
                pass
    return names


def revision_needs_a_hub_id(ppo: PpoStage) -> Iterator[Problem]:
    if ppo.stage.reward_revision is not None and is_local(ppo.stage.reward_model or "/"):
        message = f"counts only for a model of the hub, and reward_model is {ppo.stage.reward_model or 'missing'}"
        yield ppo.problem("reward_revision", message, "remove it")


def model_gives_one_score(ppo: PpoStage) -> Iterator[Problem]:
    """A folder on this machine is looked into; a hub id is left to the trainer."""
    folder = Path(ppo.stage.reward_model or "")
    # An artifact has artifact.json and, where it is an adapter, no config.json to look into.
    if not is_local(str(folder)) or is_file(folder / "artifact.json"):
        return
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        message = f"{folder} holds no model: {error}"
        yield ppo.problem("reward_model", message, "name a folder with config.json, or a reward stage's artifact")
        return
    kinds = config.get("architectures") or ["nothing"]
    # A config.json has id2label instead of num_labels, and neither for transformers' default of 2 labels.
    labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
    if not any(str(kind).endswith("ForSequenceClassification") for kind in kinds):
        message = f"{folder} holds {kinds[0]}, which gives no scores"
        yield ppo.problem("reward_model", message, "name a sequence classifier with one label")
    elif labels != 1:
        message = f"{folder} gives {labels} numbers for an answer, and a score is one"
        yield ppo.problem("reward_model", message, "name a sequence classifier with one label")


def rollout_is_whole_batches(ppo: PpoStage) -> Iterator[Problem]:
    size, batch = ppo.stage.rollout_size, ppo.stage.batch_size
    if size is not None and size % batch:
        # `if value`: below one batch the lower proposal would be 0.
        values = [str(value) for value in (size // batch * batch, (size // batch + 1) * batch) if value]
        message = f"{size} answers cannot be shared out over mini-batches of {batch}"
        yield ppo.problem("rollout_size", message, f"write rollout_size = {join_or(values)}, or another batch_size")


def horizon_needs_a_target(ppo: PpoStage) -> Iterator[Problem]:
    # It has a default, so only a key that was written is a mistake.
    if ppo.stage.kl_target is None and ppo.given("kl_horizon"):
        message = "counts only where the coefficient is steered, and there is no kl_target"
        yield ppo.problem("kl_horizon", message, "remove it, or add kl_target = 6.0")


def prompts_are_known_beforehand(ppo: PpoStage) -> Iterator[Problem]:
    for table in ppo.data_tables:
        if table.format == "text":
            message = 'PPO answers prompts, and rows of format "text" have none'
            yield ppo.problem("data", message, "name a data table with prompts")
        if table.data.streaming:
            yield table.problem("streaming", "PPO reads its prompts before the first step", "remove it, or set limit")


def vllm_can_answer(ppo: PpoStage) -> Iterator[Problem]:
    if ppo.stage.rollout_engine != "vllm":
        if ppo.stage.vllm_memory is not None:
            yield ppo.problem("vllm_memory", "is about vLLM, which does not answer here", 'add rollout_engine = "vllm"')
        return
    tables = ppo.resolved
    kind = str(tables.adapter.__struct_config__.tag)
    if ppo.given("generation_batch_size"):
        message = "is of the model that answers itself, and vLLM finds its own"
        yield ppo.problem("generation_batch_size", message, "remove it")
    # vLLM loads the base from its path by itself, and takes the adapter from a file.
    reasons = {
        f"vLLM takes plain LoRA adapters, and kind is {as_toml(kind)}": kind not in PLAIN,
        "vLLM needs a GPU, and parallel.device is cpu": tables.parallel.device == "cpu",
        "vLLM would answer with a base that is not quantized": tables.model.quantization != "none",
        "vLLM would answer with the base's own activation function": replaces(tables.noise),
    }
    for message in (reason for reason, holds in reasons.items() if holds):
        yield ppo.problem("rollout_engine", message, "remove it: the model that is trained answers itself")


RULES: tuple[Callable[[PpoStage], Iterator[Problem]], ...] = (
    there_is_one_reward,
    reward_stage_is_used,
    reward_stage_is_on_the_policy_s_base,
    function_is_there,
    revision_needs_a_hub_id,
    model_gives_one_score,
    rollout_is_whole_batches,
    horizon_needs_a_target,
    prompts_are_known_beforehand,
    vllm_can_answer,
)
