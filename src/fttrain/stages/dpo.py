"""Direct preference optimization: the better answer becomes likelier than under the reference, the worse less."""

from torch import Tensor, nn

from ftlaunch.plan import resolve
from ftlaunch.recipe.stages import Dpo
from ftlaunch.run.layout import StageDir
from ftlaunch.run.records import TrainingResult
from ftlaunch.run.spec import StageSpec
from fttrain import adapters
from fttrain.answering.in_training import with_answers
from fttrain.artifact import StartPoint
from fttrain.data.batches import MicroBatch
from fttrain.data.feed import Feed, TableFeed
from fttrain.distributed.stop_request import StopRequest
from fttrain.distributed.world import World
from fttrain.engine import Engine
from fttrain.model.scorer import Scorer
from fttrain.objectives import preference
from fttrain.preference import reference
from fttrain.preference.objective import Compared, Comparison, answer_logps
from fttrain.training.loop import Objective
from fttrain.training.session import train


def run(spec: StageSpec, folder: StageDir, world: World, stop: StopRequest) -> TrainingResult:
    """Train the stage; return the content of result.json."""
    stage = spec.stage
    assert isinstance(stage, Dpo)
    is_live = resolve.reference(stage, spec.adapter) == "live"

    def scorer(model: nn.Module, origin: StartPoint) -> Scorer:
        if is_live and origin.adapter is not None:
            adapters.add_frozen(model, origin.adapter, reference.REFERENCE, in_fp32=not spec.parallel.zero_stage)
        return Scorer(model)

    def objective(engine: Engine, feed: Feed, origin: StartPoint) -> Objective:
        if not is_live:  # the policy is still the reference here; after the first step it is not
            assert isinstance(feed, TableFeed)
            reference.precompute(feed, engine, origin, spec)
        return with_answers(Comparison(compare), spec, engine, origin, stop)

    def compare(engine: Engine, micro: MicroBatch) -> Compared:
        reference_G2 = reference.live(engine, micro) if is_live else reference.precomputed(micro)
        logps_G2, lengths_G2 = answer_logps(engine.scores(micro).smoothed_N, micro)
        ratios_G2 = logps_G2 - reference_G2
        losses_G = loss(stage, ratios_G2, lengths_G2)
        if stage.sft_weight:
            losses_G = losses_G - stage.sft_weight * (logps_G2 / lengths_G2)[:, 0]
        return Compared(losses_G, stage.beta * ratios_G2.detach())

    return train(spec, folder, world, stop, scorer, objective)


def loss(stage: Dpo, ratios_G2: Tensor, lengths_G2: Tensor) -> Tensor:
    """Return the recipe's loss, [G], from log-ratios policy / reference [G, 2] and the answers' lengths in tokens."""
    match stage.loss:
        case "sigmoid":
            return preference.dpo(ratios_G2, beta=stage.beta, label_smoothing=stage.label_smoothing)
        case "robust":
            return preference.robust_dpo(ratios_G2, beta=stage.beta, label_smoothing=stage.label_smoothing)
        case "ipo":
            return preference.ipo(ratios_G2 / lengths_G2, beta=stage.beta)
        case "hinge":
            return preference.hinge(ratios_G2, beta=stage.beta)
