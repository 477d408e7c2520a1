"""Odds ratio preference optimization: SFT on the better answer, plus a loss on the odds ratio of both."""

from ftlaunch.recipe.stages import Orpo
from ftlaunch.run.layout import StageDir
from ftlaunch.run.records import TrainingResult
from ftlaunch.run.spec import StageSpec
from fttrain.answering.in_training import with_answers
from fttrain.artifact import StartPoint
from fttrain.data.batches import MicroBatch
from fttrain.data.feed import Feed
from fttrain.distributed.stop_request import StopRequest
from fttrain.distributed.world import World
from fttrain.engine import Engine
from fttrain.model.scorer import Scorer
from fttrain.objectives import preference
from fttrain.preference.objective import Compared, Comparison, answer_logps
from fttrain.training.loop import Objective
from fttrain.training.session import train


def run(spec: StageSpec, folder: StageDir, world: World, stop: StopRequest) -> TrainingResult:
    """Train the stage; return the content of result.json."""
    stage = spec.stage
    assert isinstance(stage, Orpo)

    def compare(engine: Engine, micro: MicroBatch) -> Compared:
        logps_G2, lengths_G2 = answer_logps(engine.scores(micro).smoothed_N, micro)
        # Means over tokens: the odds of a whole answer would be 0 in floats, and favour short ones.
        mean_logps_G2 = logps_G2 / lengths_G2
        return Compared(preference.orpo(mean_logps_G2, beta=stage.beta), stage.beta * mean_logps_G2.detach())

    def objective(engine: Engine, _: Feed, origin: StartPoint) -> Objective:
        return with_answers(Comparison(compare), spec, engine, origin, stop)

    return train(spec, folder, world, stop, lambda model, _: Scorer(model), objective)
