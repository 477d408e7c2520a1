"""Proximal policy optimization: answers are sampled, scored, and trained on for a few steps, again and again."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from ftlaunch.recipe.adapter import Full
from ftlaunch.recipe.model import Model
from ftlaunch.recipe.stages import Ppo
from ftlaunch.run.layout import StageDir
from ftlaunch.run.records import TrainingResult
from ftlaunch.run.spec import StageSpec
from fttrain import adapters, artifact
from fttrain.artifact import StartPoint
from fttrain.data.batches import MicroBatch
from fttrain.data.feed import Feed, report
from fttrain.data.limits import Limits
from fttrain.data.prompts import Prompts, load_prompts
from fttrain.data.sources import with_formats
from fttrain.distributed.stop_request import StopRequest
from fttrain.distributed.world import World
from fttrain.engine import Engine
from fttrain.model import limits
from fttrain.model.scorer import DTYPES, load_base, load_tokenizer
from fttrain.noise import replace_activations
from fttrain.objectives import ppo
from fttrain.ppo import rollout, vllm_rollout
from fttrain.ppo.actor import REFERENCE, ActorCritic, ActorOutput
from fttrain.ppo.experience import PpoMicro
from fttrain.ppo.feed import RolloutFeed
from fttrain.ppo.rewards import FunctionReward, ModelReward, Reward, load_reward_model
from fttrain.ppo.rollout import RollOut
from fttrain.ppo.vllm_rollout import VllmRollout
from fttrain.training import session

SUMS = ("tokens", "policy_loss", "value_loss", "entropy", "clip_fraction", "value_clip_fraction", "policy_change")


class PpoObjective:
    """Clipped policy and value losses of a mini-batch's tokens, less their entropy."""

    def __init__(self, stage: Ppo, feed: RolloutFeed) -> None:
        self._stage = stage
        self._feed = feed
        self._sums = [0.0] * len(SUMS)

    def weight(self, micro: MicroBatch) -> float:
        return float(micro.targets_N.numel())

    def loss(self, engine: Engine, micro: MicroBatch) -> Tensor:
        assert isinstance(micro, PpoMicro)
        acted: ActorOutput = engine.forward(micro)
        policy = ppo.policy_loss(acted.logps_N, micro.old_logps_N, micro.advantages_N, clip=self._stage.clip)
        value = ppo.value_loss(acted.values_N, micro.old_values_N, micro.returns_N, clip=self._stage.value_clip)
        change_N = ppo.token_kl(micro.old_logps_N, acted.logps_N.detach(), estimator="k3")
        columns = (policy.losses_N, value.losses_N, acted.entropy_N, policy.clipped_N, value.clipped_N, change_N)
        sums = [float(micro.targets_N.numel()), *(float(column.detach().sum()) for column in columns)]
        self._sums = [total + part for total, part in zip(self._sums, sums, strict=True)]
        loss = policy.losses_N.sum() + self._stage.value_weight * value.losses_N.sum()
        return loss - self._stage.entropy_weight * acted.entropy_N.sum()

    def measures(self, engine: Engine) -> dict[str, float]:
        """Return means over the tokens of the step's mini-batch, and those of its rollout."""
        tokens, *sums = engine.world.sum(self._sums)
        self._sums = [0.0] * len(SUMS)
        assert self._feed.experience is not None
        means = {name: total / tokens for name, total in zip(SUMS[1:], sums, strict=True)}
        return {**means, **self._feed.experience.measures()}

    def evaluate(self, engine: Engine, feed: Feed) -> dict[str, float]:  # noqa: ARG002 the protocol's
        return self._feed.evaluate()


def run(spec: StageSpec, folder: StageDir, world: World, stop: StopRequest) -> TrainingResult:
    """Train the stage; return the content of result.json."""
    spec = with_formats(spec)
    stage = spec.stage
    assert isinstance(stage, Ppo)
    origin = artifact.origin(spec, folder)
    if stage.rollout_engine == "vllm":
        vllm_rollout.refuse_what_cannot_be(world, artifact.replaced_activations(spec, origin))
    tokenizer = load_tokenizer(origin.tokenizer, origin.base.revision)
    prompts = [load_prompts(data, tokenizer, spec.seed) for data in spec.data.values()]
    if world.is_main:
        for name, one in zip(spec.data, prompts, strict=True):
            report(name, one.counts)
    # An earlier reward stage of the run is named by its folder, so that a moved run still finds it.
    reward_model = None if spec.reward is None else str(folder.path.parent / spec.reward)
    reward_model = reward_model or stage.reward_model
    reward = _reward(spec, stage, reward_model)

    def make_actor(policy: nn.Module, _: StartPoint) -> ActorCritic:
        return _actor(spec, stage, policy, origin, reward_model)

    engine = session.build(spec, stage, world, origin, make_actor)
    _require_readable(prompts, stage, tokenizer, limits.of(engine.scorer.causal))
    roll_out = _roll_out(spec, stage, prompts, engine, origin, folder)
    feed = RolloutFeed(spec, stage, prompts, tokenizer, engine, reward, roll_out, folder.samples)
    objective = PpoObjective(stage, feed)
    return session.complete(spec, folder, stop, origin, tokenizer, engine, feed, objective)


def _require_readable(prompts: list[Prompts], stage: Ppo, tokenizer: Any, of_model: Limits) -> None:
    """Raise UserError where a prompt, or the answer after it, is more than the model can read."""
    for prompt in [prompt for one in prompts for prompt in [*one.train, *one.test]]:
        of_model.require_short(f"{prompt.where}, with max_new_tokens", len(prompt.ids_T) + stage.max_new_tokens)
        of_model.require_known(prompt.where, prompt.ids_T, tokenizer)


def _roll_out(
    spec: StageSpec, stage: Ppo, prompts: list[Prompts], engine: Engine, origin: StartPoint, folder: StageDir
) -> RollOut:
    if stage.rollout_engine == "torch":
        assert isinstance(engine.scorer, ActorCritic)
        rollout.refuse_what_cannot_answer(engine, engine.scorer)
        return partial(rollout.roll_out, engine, engine.scorer)
    longest = max(len(prompt.ids_T) for one in prompts for prompt in [*one.train, *one.test])
    return VllmRollout(spec, engine, origin, longest, folder.path / "policy")


def _reward(spec: StageSpec, stage: Ppo, reward_model: str | None) -> Reward:
    if reward_model is None:
        assert stage.reward_function is not None
        return FunctionReward(stage.reward_function)
    return ModelReward(
        artifact.load_tokenizer(reward_model, stage.reward_revision), micro_batch_size=spec.micro_batch_size
    )


def _actor(spec: StageSpec, stage: Ppo, policy: nn.Module, origin: StartPoint, reward_model: str | None) -> ActorCritic:
    """Return the policy with a new value head, a reference, and the reward model if a model gives the scores."""
    # The reference is the policy before training. For a new adapter that is the base with the adapter disabled; a
    # continued adapter is loaded a second time, frozen; only full training needs a copy of all weights.
    dtype, in_fp32 = DTYPES[spec.model.dtype], not spec.parallel.zero_stage
    frozen, replaced = None, artifact.replaced_activations(spec, origin)
    if isinstance(spec.adapter, Full):
        frozen = load_base(origin.base, dtype=dtype, packing=stage.packing).requires_grad_(False)
        replace_activations.install(frozen, replaced)
    elif origin.adapter is not None:
        adapters.add_frozen(policy, origin.adapter, REFERENCE, in_fp32=in_fp32)
    head = None
    if reward_model is not None:
        place = Model(path=reward_model, revision=stage.reward_revision)
        head = load_reward_model(place, policy, origin.base, replaced, dtype=dtype, in_fp32=in_fp32)
    return ActorCritic(policy, temperature=stage.temperature, frozen=frozen, reward_model=head)
