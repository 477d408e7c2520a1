"""Answers that a training stage generates, in PPO's rollouts and at evaluations."""

from msgspec import Struct

from ftlaunch.plan.cost import shape as shapes
from ftlaunch.plan.cost.activations import FLOAT
from ftlaunch.plan.cost.shape import Shape
from ftlaunch.recipe.stages import EVAL_BATCH, EVAL_NEW_TOKENS, EVAL_PROMPTS, Ppo, Training
from ftlaunch.run.spec import StageSpec

CHOSEN = FLOAT + FLOAT
"""Bytes of a logit where the likeliest token is taken: as it is computed, and in fp32."""
DRAWN = CHOSEN + 8 + 8
"""Bytes of a logit in sampling: in fp32, as log-probability, and as probability and its running sum in fp64."""


class Answers(Struct, frozen=True, kw_only=True):
    """What one process generates at a time."""

    phase: str
    count: int
    """Answers in all."""
    batch: int
    """Answers side by side."""
    prompt: int
    """Tokens of a prompt at most."""
    tokens: int
    """Tokens of an answer at most."""
    of_logit: int
    """Bytes of a logit of the next token with all that is made of it."""

    def memory(self, shape: Shape, size: int, *, adapted: bool) -> tuple[int, int]:
        """Return the bytes of keys and values, and of the rest.

        The rest is the larger of two: the widest layer's work on the prompts, or the logits of one token each. A cache
        grows by joining: the layer at work holds its keys and values twice.
        """
        cache = shapes.cache_bytes(shape, self.batch, self.prompt + self.tokens, size)
        # The gate after its function, what an adapter adds to the layer next to it, and the sum of the two.
        at_work = size * ((4 if adapted else 3) * shape.mlp + 2 * shape.width) + FLOAT * shape.width
        logits = self.batch * shape.vocabulary * self.of_logit
        return cache, max(self.batch * self.prompt * at_work, logits + cache // shape.layers)


def of_training(spec: StageSpec, stage: Training) -> Answers | None:
    """Return what a process of a stage generates at a time; None where nothing is generated in it."""
    longest = max((data.max_length for data in spec.data.values()), default=0)
    if isinstance(stage, Ppo):
        if stage.rollout_engine == "vllm":
            return None
        count, tokens = -(-(stage.rollout_size or stage.batch_size) // spec.world_size), stage.max_new_tokens
        batch, phase, of_logit = stage.generation_batch_size, "rollout", DRAWN
    elif stage.eval_metrics:
        count = -(-(stage.eval_prompts or EVAL_PROMPTS) // spec.world_size)
        tokens = stage.eval_max_new_tokens or EVAL_NEW_TOKENS
        phase, of_logit = "answers at evaluations", DRAWN if stage.eval_temperature else CHOSEN
        # Each beam is an answer of its own, from its prompt on.
        batch, count = min(EVAL_BATCH, count) * (stage.eval_beams or 1), count * (stage.eval_beams or 1)
    else:
        return None
    return Answers(phase=phase, count=count, batch=min(batch, count), prompt=longest, tokens=tokens, of_logit=of_logit)
