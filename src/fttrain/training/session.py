"""The frame of every training stage: build the model, resume from the newest checkpoint, train, save the artifact."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from msgspec import UNSET
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful

from ftlaunch.recipe.noise import NoNoise
from ftlaunch.recipe.stages import Dpo, Pairwise, Ppo, Reward, Sft, Training
from ftlaunch.run.layout import StageDir
from ftlaunch.run.records import TrainingResult
from ftlaunch.run.spec import StageSpec
from fttrain import adapters, artifact
from fttrain.artifact import StartPoint
from fttrain.checkpoint import random_states
from fttrain.checkpoint.store import Checkpoints
from fttrain.data import feed as feeds
from fttrain.data.batches import Layout
from fttrain.data.feed import Feed
from fttrain.data.sources import with_formats
from fttrain.data.templates import trained_template
from fttrain.distributed.stop_request import StopRequest
from fttrain.distributed.world import World
from fttrain.engine import Engine, RankAllocator
from fttrain.model import classifier, limits, packing
from fttrain.model.packing import STRETCHES
from fttrain.model.scorer import DTYPES, RewardHead, Scorer, load_base, load_tokenizer
from fttrain.noise import build as noise_builder
from fttrain.noise import modules, replace_activations
from fttrain.quant import qat
from fttrain.superweights import layers
from fttrain.training import optim, preflight, probe
from fttrain.training.counters import Progress
from fttrain.training.loop import Objective, fit
from fttrain.training.metrics import MetricsLog, keep
from fttrain.training.optim import Schedule
from fttrain.training.pace import PaceLog
from fttrain.training.tracking import Trackers, require_installed

MakeScorer = Callable[[nn.Module, StartPoint], Scorer]
"""Makes the module to train around a model whose trainable weights are chosen."""
MakeObjective = Callable[[Engine, Feed, StartPoint], Objective]
"""Makes the objective; called while the weights are still those that the stage starts from."""


def train(
    spec: StageSpec,
    folder: StageDir,
    world: World,
    stop: StopRequest,
    make_scorer: MakeScorer,
    make_objective: MakeObjective,
) -> TrainingResult:
    """Train a stage on rows from data sets; return the content of result.json."""
    spec = with_formats(spec)
    stage = spec.stage
    assert isinstance(stage, Sft | Pairwise)
    origin = artifact.origin(spec, folder)
    tokenizer = load_tokenizer(origin.tokenizer, origin.base.revision)
    if isinstance(stage, Reward):
        classifier.padding(tokenizer, trained_template(tokenizer, spec.data.values()))
    feed = feeds.build(spec, stage, tokenizer, world, stop.pending, folder.preparing)
    engine = build(spec, stage, world, origin, make_scorer)
    feed.require(limits.of(engine.scorer.causal), getattr(spec.adapter, "virtual_tokens", 0))
    # The layout is known only once the probe has tried the model; references are computed in that layout.
    feed.lay(engine.layout)
    objective = make_objective(engine, feed, origin)
    return complete(spec, folder, stop, origin, tokenizer, engine, feed, objective)


def complete(
    spec: StageSpec,
    folder: StageDir,
    stop: StopRequest,
    origin: StartPoint,
    tokenizer: Any,
    engine: Engine,
    feed: Feed,
    objective: Objective,
) -> TrainingResult:
    """Train the stage to its end, from its newest good checkpoint if there is one, and save its artifact."""
    stage, world = spec.stage, engine.world
    assert isinstance(stage, Training)
    if world.is_main:
        keep(folder.probe, engine.verdict, "what the probe has found is")  # for `status`
    of_adapter = adapters.stateful(engine.scorer.model, spec.adapter, feed.num_steps)
    parts = {"stage": feed, "adapter": of_adapter}
    carried = {name: part for name, part in parts.items() if isinstance(part, Stateful)}
    engine.allocator = of_adapter if isinstance(of_adapter, RankAllocator) else None
    checkpoints = Checkpoints(folder.checkpoints, spec, engine, carried)
    loaded = checkpoints.load()
    progress = Progress.resumed(loaded.state if loaded else {}, stage.best_by or stage.evaluated[0])
    metrics = MetricsLog(folder.metrics, is_main=world.is_main, last_step=progress.step)
    with closing(Trackers(spec, folder, is_main=world.is_main)) as trackers:
        metrics.also = trackers.log
        fit(
            objective,
            engine,
            feed,
            stage,
            Schedule(stage, peak=spec.learning_rate, num_steps=feed.num_steps),
            checkpoints,
            metrics,
            stop,
            PaceLog(world, _pace(folder)),
            progress,
        )
    tokenizer.chat_template = trained_template(tokenizer, spec.data.values())
    artifact.save(spec, origin, engine, tokenizer, folder.artifact)
    return TrainingResult(
        steps=progress.step,
        tokens=progress.tokens,
        trained_parameters=engine.num_trained,
        data=dict(zip(spec.data, feed.counts(), strict=True)),
        artifact=folder.artifact.name,
        probe=engine.verdict,
        best=progress.best() or UNSET,
    )


def _pace(folder: StageDir) -> Path | None:
    """Return where the pace of ranks is noted: with the newest attempt, as another may have other ranks."""
    attempts = folder.all_attempts()
    return attempts[-1].pace if attempts else None


def build(
    spec: StageSpec, stage: Sft | Pairwise | Ppo, world: World, origin: StartPoint, make_scorer: MakeScorer
) -> Engine:
    """Return the engine with model and optimizer. All ranks start from the same weights, each with its own noise."""
    # 1. Super weights are searched before the engine exists: afterwards ZeRO-3 loads models in shards. An adapter that
    #    is continued has its layers already.
    adapter = spec.adapter if origin.adapter else layers.resolved(spec.adapter, origin.base, world)
    require_installed(spec.track)
    # 2. The engine comes before the base: it makes `from_pretrained` load shards under ZeRO-3.
    engine = Engine(spec, world)
    # 3. Weights that are trained in full are held in fp32, except under ZeRO, which keeps fp32 masters of its own.
    dtype = DTYPES[spec.model.dtype]
    trained_in_full = origin.adapter is None and not artifact.has_adapter(spec)
    held_in = torch.float32 if trained_in_full and not engine.zero_stage else dtype
    print(f"loading {origin.base.path}", flush=True)  # `ftlaunch watch` shows the newest line of rank 0
    base = load_base(origin.base, dtype=held_in, packing=stage.packing)
    replace_activations.install(base, artifact.replaced_activations(spec, origin))
    preflight.of_dropout(base, stage, world)
    # 4. Sites of noise are looked up by name before the adapter adds modules that would match as well.
    disturbed = [] if isinstance(spec.noise, NoNoise) else modules.find(base, spec.noise.sites)
    preflight.of_base(base, None if origin.adapter else adapter, origin.base, world)
    router_weight = preflight.router_weight(base, stage, world, in_full=trained_in_full)
    # One seed for all ranks, so that each creates the same adapter; and here, as loading some families draws numbers,
    # others under ZeRO-3.
    torch.manual_seed(spec.seed)
    model = adapters.attach(
        base, adapter, origin.adapter, in_fp32=not engine.zero_stage, accumulation=spec.accumulation
    )
    preflight.of_merge(spec, origin.base, model, world)
    # 5. After the adapter: the sum of weight and adapter is rounded, not the weight alone.
    if spec.model.rounding:
        qat.install(model, spec.model.rounding, origin.adapter)
    # 6. After the adapter, too: PEFT would otherwise have gradients computed through all frozen layers.
    if stage.activation_checkpointing:
        checkpoint_activations(base)
    scorer = make_scorer(model, origin)
    scorer.router_weight = router_weight
    if engine.zero_stage:
        hold_heads_in(dtype, scorer)
    scorer.disturbance = noise_builder.disturbance(base, disturbed, spec.noise, scorer.places)
    scorer.train()
    # 7. The engine wraps a complete module: parameters that come later would be trained by nobody.
    engine.prepare(scorer, optim.build(spec.optimizer, scorer.named_parameters()))
    _try(spec, engine, Layout(stage.packing, isinstance(stage, Pairwise) and stage.share_prompt), origin)
    # 8. From here on each rank draws dropout and noise of its own. A checkpoint's random states replace these.
    random_states.begin(spec.seed, 0, world.rank)
    return engine


def _try(spec: StageSpec, engine: Engine, wanted: Layout, origin: StartPoint) -> None:
    """Choose a layout of rows that is right for the engine's model."""
    if spec.model.rounding:
        # Rounded activations depend on what else is in the batch, so that nothing can be compared.
        engine.verdict = {"layout": "not tried, as the model is trained through rounding"}
        if wanted.packing and packing.refusal(engine.scorer.causal) is None:
            engine.layout = wanted
        else:
            engine.scorer.pad()
        return
    longest = max(data.max_length for data in spec.data.values())
    longest += spec.stage.max_new_tokens if isinstance(spec.stage, Ppo) else 0
    limit = packing.stretches_beyond(engine.scorer.causal)
    warnings: list[str] = []
    if limit is not None and longest > limit:
        warnings.append(f"each row is computed by itself: the model {STRETCHES}, and rows may be longer than {limit}")
        engine.scorer.compute_alone()
        wanted = Layout(packing=False)
    is_new = origin.adapter is None and spec.adapter.begins_as_base
    has_reference = isinstance(spec.stage, Dpo)
    verdict = probe.settle(
        engine, wanted, spec.model.dtype, warnings, begins_as_base=is_new, has_reference=has_reference
    )
    engine.verdict = asdict(verdict)


def hold_heads_in(dtype: torch.dtype, scorer: nn.Module) -> None:
    """Give heads the model's number format: DeepSpeed wants a single one, and casts none if weights are sharded."""
    for module in scorer.modules():
        if isinstance(module, RewardHead):
            module.to(dtype)


def checkpoint_activations(base: Any) -> None:
    """Have each layer keep its input only, and compute the rest again in the backward pass."""
    base.gradient_checkpointing_enable({"use_reentrant": False})
    # transformers switches this on for adapters; then frozen layers below the lowest trained one get gradients, too.
    base.disable_input_require_grads()
