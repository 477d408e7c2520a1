"""What a plan tells of its steps: a line for each thing that the recipe left open or that a user may want to know."""

from pathlib import Path

import msgspec

from ftlaunch.plan import family, resolve
from ftlaunch.plan.cost import body
from ftlaunch.plan.machine import NATIVE_FROM, Machine
from ftlaunch.recipe.adapter import Adalora, Full, LowRank, Prefix, Prompt, PTuning
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.model import BitLinear, Model, Qat
from ftlaunch.recipe.noise import NoNoise, replaces
from ftlaunch.recipe.stages import Dpo, Evaluate, Merge, Pairwise, Ppo, Reward, Sft, Training
from ftlaunch.rows import looks
from ftlaunch.rows.conversations import agreed_arguments, row_format
from ftlaunch.run.spec import StageSpec


def of_step(spec: StageSpec, machine: Machine | None = None) -> dict[str, str]:
    """Notes under labels such as "learning rate"; `machine` is where the step will run, if that is known."""
    match spec.stage:
        case Merge():
            return {"merge": f"folds {spec.start} into its base and compares the result with the adapter model"}
        case Evaluate() as stage:
            return _evaluation_notes(spec, stage)
        case stage:
            return _training_notes(spec, stage, machine)


def _evaluation_notes(spec: StageSpec, stage: Evaluate) -> dict[str, str]:
    (data,) = spec.data.values()
    part = f"the first {stage.prompts} of " * bool(stage.prompts) + "what is held out of " * bool(data.test)
    compared = " and the plain base" if stage.compare and spec.start else ""
    return {
        "evaluates": f"{spec.start or spec.model.path}{compared}; each process holds all of a model",
        "data": f"{stage.data} ({part}{data.path})",
        "metrics": ", ".join(Path(metric).name for metric in stage.metrics),
        "answers": f"at most {stage.max_new_tokens} tokens, {_decoding_note(stage)}",
        "intervals": f"95 %, of {stage.resamples} resamples of the prompts" if stage.resamples else "none",
    }


def _decoding_note(stage: Evaluate) -> str:
    if stage.temperature:
        return f"drawn at temperature {stage.temperature:g}, top_p {stage.top_p:g}"
    return f"by beam search over {stage.beams}" if stage.beams > 1 else "the likeliest token each time"


def _training_notes(spec: StageSpec, stage: Training, machine: Machine | None) -> dict[str, str]:
    rows = "pairs" if isinstance(stage, Pairwise) else "rows"
    return {
        "model": _model_note(spec),
        "dtype": _dtype_note(spec, machine),
        **_family_notes(spec),
        "adapter": _adapter_note(spec),
        "data": ", ".join(f"{name} ({data.path}){_format_note(data)}" for name, data in spec.data.items()),
        **_template_notes(spec),
        **_noise_notes(spec),
        **_objective_notes(spec, stage),
        "length": _length_note(stage),
        "batch": f"{stage.batch_size} {rows} = {spec.micro_batch_size} a micro-batch × {spec.accumulation} accumulated"
        f" × {spec.world_size} process{'es' if spec.world_size > 1 else ''}",
        **({"layout": layout} if (layout := family.layout_note(spec)) else {}),
        **_router_notes(spec, stage),
        **_dropout_notes(spec, stage),
        "learning rate": _learning_rate_note(spec, stage),
        **_evaluation_notes_of(stage),
    }


def _evaluation_notes_of(stage: Training) -> dict[str, str]:
    """What is said of answers at evaluations, and of the best checkpoint."""
    scored = ", ".join(Path(metric).name for metric in stage.eval_metrics)
    notes = {"answers": f"scored at each evaluation, by {scored}"} if scored else {}
    return notes | ({"best": f"the checkpoint whose {stage.best_by} is best is kept"} if stage.best_by else {})


def _family_notes(spec: StageSpec) -> dict[str, str]:
    """What the model has that a plain Llama has not, and how much of it an adapter is on."""
    notes = {"family": "; ".join(found)} if (found := family.mechanisms(Path(spec.model.path))) else {}
    if not isinstance(spec.adapter, LowRank) or (counted := body.read(spec.model.path)) is None:
        return notes
    if (share := counted.adapted_share(spec.adapter)) is None:
        return notes
    rest = counted.expert_share
    able = family.name(Path(spec.model.path)) not in family.READ_PAST
    way = "adapter.experts = true adapts them" if able else "no adapter can be on them"
    left = f"; experts are not ({rest:.1%}): {way}"
    is_left = rest and not spec.adapter.experts
    # Kernels of such mixers read some weights past an adapter, and blocks may share theirs; the start tells which.
    word = "at most" if family.is_stateful(Path(spec.model.path)) else "about"
    return {**notes, "adapted": f"{word} {share:.1%} of the body's weights{left if is_left else ''}"}


def _dropout_notes(spec: StageSpec, stage: Training) -> dict[str, str]:
    """What is said of the dropout that the model's own config asks for; stages that compare answers turn it off."""
    rates = family.dropout(Path(spec.model.path)) if isinstance(stage, Sft) else ""
    return {"dropout": f"on in training, as the model's config has it: {rates}"} if rates else {}


def _router_notes(spec: StageSpec, stage: Training) -> dict[str, str]:
    """What is said of the loss that balances experts, where the recipe or the model's config asks for it."""
    wanted = family.router_loss_of(Path(spec.model.path))
    set_to = stage.router_loss if isinstance(stage, Sft) else None
    in_full = isinstance(stage, Sft) and isinstance(spec.adapter, Full)
    weight = set_to if set_to is not None else wanted if in_full else 0
    if weight:
        return {"router loss": f"{weight:g} times the loss that balances experts is added"}
    if not wanted or set_to is not None:
        return {}
    way = f"; router_loss = {wanted:g} in the stage adds it" if isinstance(stage, Sft) else ""
    return {
        "router loss": f"left out: the model's config asks for {wanted:g} times the loss that balances experts{way}"
    }


def _format_note(data: Data) -> str:
    """The format, which the recipe may have left to the rows."""
    if looks.is_open(data):
        return ", in the format that its fields tell"
    return "" if data.format is None else f", format {data.format}"


def _template_notes(spec: StageSpec) -> dict[str, str]:
    """What the trained model's chat template takes of data sets that do not agree on it."""
    spoken = {name: data for name, data in spec.data.items() if row_format(data) != "text"}
    told: list[str] = []
    if len({data.template for data in spoken.values()}) > 1:
        first = next(name for name, data in spoken.items() if data.template != "none")
        told.append(f"the data sets have different ones, of which the model keeps that of {first}")
    named = {name for data in spoken.values() for name in data.template_arguments}
    if differing := sorted(named - agreed_arguments(spoken.values()).keys()):
        told.append(f"the model's has no default for {', '.join(differing)}, in which the data sets differ")
    return {"template": "; ".join(told)} if told else {}


def _objective_notes(spec: StageSpec, stage: Training) -> dict[str, str]:
    match stage:
        case Reward():
            # `start` reads "02-reward/artifact": the kind follows two digits and a dash.
            goes_on = (spec.start or "").startswith("reward/", 3)
            return {
                "head": f"one number at an answer's last token, {f'going on from {spec.start}' if goes_on else 'new'}"
            }
        case Dpo():
            return {"loss": stage.objective, "reference": _reference_note(spec, stage)}
        case Ppo():
            return _ppo_notes(spec, stage)
        case _:
            return {"loss": stage.objective} if stage.objective else {}


def _noise_notes(spec: StageSpec) -> dict[str, str]:
    noise = spec.noise
    where = noise.sites if isinstance(noise.sites, str) else ", ".join(noise.sites)
    notes: dict[str, str] = {}
    if not isinstance(noise, NoNoise):
        elsewhere = {"sites", "activation"}
        settings = {name: value for name, value in msgspec.structs.asdict(noise).items() if name not in elsewhere}
        told = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
        notes["noise"] = f"{noise.__struct_config__.tag} on {where} ({told}), in training only"
    if replaces(noise):
        notes["activation"] = f"{noise.activation} takes the place of {where}, in the artifact too"
    return notes


def _ppo_notes(spec: StageSpec, stage: Ppo) -> dict[str, str]:
    size = stage.rollout_size or stage.batch_size
    batches, reward = size // stage.batch_size, stage.reward_function or stage.reward_model or spec.reward
    inner = f"{stage.ppo_epochs} times over them in {batches} mini-batch{'es' if batches > 1 else ''}"
    steered = "" if stage.kl_target is None else f", steered towards {stage.kl_target:g} nats per answer"
    start = spec.start or "the base"
    is_full = isinstance(spec.adapter, Full)
    copy = "a frozen copy of all weights, in memory too" if is_full else "no second model is loaded"
    return {
        "rollout": f"{size} answers of at most {stage.max_new_tokens} tokens at temperature {stage.temperature:g}, then"
        f" {inner}: {batches * stage.ppo_epochs} optimizer steps",
        "reward": f"{'function' if stage.reward_function else 'model'} {reward}",
        "KL": f"{stage.kl_estimator}, coefficient {stage.kl_coefficient:g}{steered}",
        "reference": f"{start} as it is at the start; {copy}",
        "value": "a new head on the policy's own hidden states; dropout is off",
    }


def _reference_note(spec: StageSpec, stage: Dpo) -> str:
    start = spec.start or "the base"
    if resolve.reference(stage, spec.adapter) == "precomputed":
        return f"{start}, asked for all pairs before the first step; its answers are kept on disk"
    return f"{start} as it is at the start, asked at each step; no second model is loaded"


def _model_note(spec: StageSpec) -> str:
    note = f"{spec.model.path}{_quantization_note(spec.model)}"
    if spec.start is None:
        return note
    if spec.start.endswith("/model"):  # the adapter is another than that of the stage before
        return f"{note}, with the adapter of the stage before merged into it: {spec.start}"
    return f"{note}, going on from {spec.start}"


def _dtype_note(spec: StageSpec, machine: Machine | None) -> str:
    """The number format, and why; the trainer asks torch again where the stage runs."""
    written, device = spec.model.dtype, spec.parallel.device
    if machine is None or (device == "cuda" and not machine.gpus):
        ladder = "bf16 where the device computes it natively, else fp16 on a GPU and fp32 on a CPU"
        return f"auto: {ladder}; decided where the stage runs" if written == "auto" else written
    gpus = () if device == "cpu" else machine.gpus[: spec.parallel.procs_per_node]
    # One GPU that is too old decides for all, as ranks compute in one format.
    old = next((name for name, major in gpus if major < NATIVE_FROM), None)
    if gpus:
        name = old or gpus[0][0]
        why = f"{name} has no arithmetic for it" if old else f"{name} computes it natively"
    else:
        why = "the CPU here " + (f"has {machine.cpu_bf16}" if machine.cpu_bf16 else "has neither AVX512-BF16 nor AMX")
    native = not old if gpus else machine.cpu_bf16 is not None
    other = "fp16" if gpus and spec.adapter.takes_loss_scaling else "fp32"
    if written == "auto":
        return f"bf16, as {why} (auto)" if native else f"{other}, not bf16, as {why} (auto)"
    if written == "bf16" and not native:
        return f'bf16, which is emulated and slow, as {why}; dtype = "auto" would take {other}'
    return written


def _quantization_note(model: Model) -> str:
    match model.quantization:
        case Qat() as qat:
            scale = "learned" if qat.learned_step else "by range"
            whole = "" if qat.symmetric else "un"
            per = f"group of {qat.group_size}" if qat.granularity == "group" else qat.granularity
            return f", trained through weights of {qat.bits} bits ({whole}signed, a scale a {per}, {scale})"
        case BitLinear() as bits:
            normed = ", normed first" if bits.rms_norm else ""
            return f", trained through weights of -1, 0 and 1 and inputs of 8 bits{normed}"
        case "none":
            return ""
        case held:
            return f", weights held in {held}"


def _adapter_note(spec: StageSpec) -> str:
    adapter = spec.adapter
    match adapter:
        case Full():
            return "none: every weight is trained"
        case Prefix():
            made = ", made by two layers" if adapter.projection else ""
            return f"{adapter.label}: keys and values of {adapter.virtual_tokens} virtual tokens in every layer{made}"
        case Prompt():
            begun = {"text": "the text", "random": "noise"}.get(adapter.init, "words of the vocabulary")
            return f"{adapter.label}: embeddings of {adapter.virtual_tokens} virtual tokens, which begin as {begun}"
        case PTuning():
            made = adapter.encoder.upper()
            return f"{adapter.label}: embeddings of {adapter.virtual_tokens} virtual tokens, made by an {made}"
        case _:
            return _low_rank_note(adapter)


def _low_rank_note(adapter: LowRank) -> str:
    targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
    pruned = isinstance(adapter, Adalora)
    rank = f"{adapter.first_rank}, pruned to {adapter.rank} on average," if pruned else str(adapter.rank)
    stacked = " and the experts" if adapter.experts else ""
    return (
        f"{adapter.label} of rank {rank} on {targets}{stacked}{_layers_note(adapter.layers)},"
        f" scale {adapter.scale_formula} = {adapter.scale:.4g}"
    )


def _layers_note(layers: list[int] | str | None) -> str:
    match layers:
        case None:
            return ""
        case "super-weights":
            return " of the layers with super weights, which are looked for when the stage begins"
        case str():
            word, _, number = layers.partition(":")
            return f" of the top {number} layers" if word == "top" else f" of the last of every {number} layers"
        case list():
            return f" of layers {', '.join(map(str, layers))}"


def _length_note(stage: Training) -> str:
    if stage.steps is not None:
        return f"{stage.steps} optimizer step{'s' if stage.steps > 1 else ''}"
    if stage.epochs is None:
        return "1 epoch, as neither epochs nor steps is given"
    return f"{stage.epochs:g} epoch{'s' if stage.epochs != 1 else ''}"


def _learning_rate_note(spec: StageSpec, stage: Training) -> str:
    note = f"{spec.learning_rate:g}"
    if stage.learning_rate is None:
        note += f" (none is given; this suits {stage.__struct_config__.tag} with {spec.adapter.__struct_config__.tag})"
    ratio = spec.optimizer.lora_plus_ratio
    if ratio is not None:
        note += f", of B matrices {spec.learning_rate * ratio:g} (LoRA+)"
    warmup = f"{stage.warmup} steps" if isinstance(stage.warmup, int) else f"{stage.warmup:.3g} of all steps"
    return f"{note}, {stage.schedule}{f' after a warm-up of {warmup}' if stage.warmup else ''}"
