"""Evaluation: the trained model, and the base for comparison, answer held-out prompts and are scored."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from msgspec import UNSET

from ftlaunch.recipe.stages import Evaluate
from ftlaunch.run.layout import StageDir
from ftlaunch.run.records import EvaluationResult
from ftlaunch.run.spec import StageSpec
from fttrain.answering.examination import Exam, Examined, examine, set_exam
from fttrain.answering.generation import Decoding
from fttrain.answering.predictions import write_predictions
from fttrain.data.sources import settled
from fttrain.distributed.stop_request import StoppedEarly, StopRequest
from fttrain.distributed.world import World
from fttrain.evaluation.scoring import Scored, gaps, load_metric, needs_of, score
from fttrain.tools.chat import load, recorded_dtype

T = TypeVar("T")
R = TypeVar("R")

TRAINED, BASE = "trained", "base"
"""What predictions and result.json call the two models."""


def run(spec: StageSpec, folder: StageDir, world: World, stop: StopRequest) -> EvaluationResult:
    """Evaluate the model, and the base if the recipe compares; return all scores. Raises StoppedEarly on request."""
    stage = spec.stage
    assert isinstance(stage, Evaluate)
    for metric in stage.metrics:
        load_metric(metric)  # a metric that cannot be loaded must fail before an hour of answers
    torch.manual_seed(spec.seed + world.rank)
    share = shared(world, stop)
    exam, models = _examine_all(spec, stage, folder, world, share)
    scored = {
        name: score(stage.metrics, examined.inputs, stage.resamples, spec.seed) for name, examined in models.items()
    }
    if world.is_main:
        both = {name: (models[name], scored[name]) for name in models}
        write_predictions(folder.predictions, exam, both)
    return result(stage, exam, models, scored)


def _examine_all(
    spec: StageSpec, stage: Evaluate, folder: StageDir, world: World, share: Callable[..., list[Any]]
) -> tuple[Exam, dict[str, Examined]]:
    """Return the exam and each model's results. Both models get the prompts of one tokenizer."""
    base = spec.model.path + (f"@{spec.model.revision}" if spec.model.revision else "")
    trained = base if spec.start is None else str(folder.path.parent / spec.start)
    paths = {TRAINED: trained, BASE: base} if stage.compare and trained != base else {TRAINED: trained}
    decoding = Decoding(stage.max_new_tokens, stage.batch_size, stage.temperature, stage.top_p, stage.beams)
    exam, tokenizer = Exam(), None
    found: dict[str, Examined] = {}
    for name, path in paths.items():
        model, own = load(path, world.device, recorded_dtype([trained]))
        if tokenizer is None:
            tokenizer = own
            exam = _set(spec, stage, tokenizer, world)
        found[name] = examine(model, tokenizer, exam, decoding, share)
        # Freed before the base is loaded: both at once may not fit a GPU.
        del model
    return exam, found


def _set(spec: StageSpec, stage: Evaluate, tokenizer: Any, world: World) -> Exam:
    """Return the exam; one rank of each node tokenizes, and the others read its cache."""
    data = settled(next(iter(spec.data.values())))
    needs, fields = needs_of(stage.metrics), (stage.choices_field, stage.label_field)

    def make() -> Exam:
        return set_exam(
            data, tokenizer, spec.seed, needs, most=stage.prompts, choices_field=fields[0], label_field=fields[1]
        )

    made = make() if world.local_rank == 0 else None
    world.barrier()
    return made or make()


def shared(world: World, stop: StopRequest) -> Callable[..., list[Any]]:
    """Return a `Share` over all ranks: of N ranks each does every N-th item. It raises StoppedEarly on request."""

    def share(items: Sequence[T], work: Callable[[Sequence[T]], Iterable[Mapping[int, R]]]) -> list[R]:
        places = list(range(world.rank, len(items), world.size))
        mine: dict[int, R] = {}
        reason: str | None = None
        for some in work([items[place] for place in places]):
            mine |= {places[at]: value for at, value in some.items()}
            print(f"{len(mine)} of this rank's {len(places)} done", flush=True)
            if reason := stop.poll():
                break
        # Ranks work at their own pace, so they meet only at the end; one that was asked to stop ends early, all raise.
        reasons = [one for one in world.gather(reason) if one]
        if reasons:
            raise StoppedEarly(reasons[0], 0)
        return world.collect(mine, len(items))

    return share


def result(
    stage: Evaluate, exam: Exam, models: Mapping[str, Examined], scored: Mapping[str, Scored]
) -> EvaluationResult:
    """What was asked, and what came of it."""
    trained, base, answers = scored[TRAINED], scored.get(BASE), models[TRAINED].answers
    return EvaluationResult(
        data=stage.data,
        examples=max(len(one.predictions) for one in models[TRAINED].inputs.values()),
        references=sum(len(one.references) for one in exam.asked),
        prompts_trained_on=sum(one.is_trained for one in exam.asked),
        scores={key: found.value for key, found in trained.scores.items()},
        intervals={key: found.interval for key, found in trained.scores.items() if found.interval},
        base_scores={key: found.value for key, found in base.scores.items()} if base else UNSET,
        differences=gaps(trained, base) if base else UNSET,
        answer_words=sum(len(text.split()) for text in answers) / len(answers) if answers else UNSET,
    )
