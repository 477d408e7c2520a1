"""The model card of what a stage has made: README.md in the folder of its weights, as the hub shows it."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ftlaunch.recipe.data import Data
from ftlaunch.recipe.names import is_local
from ftlaunch.recipe.stages import Merge
from ftlaunch.report.facts import RunFacts, StageFacts, changed_keys
from ftlaunch.run.files import write_atomic
from ftlaunch.run.layout import REWARD_HEAD, RunDir
from ftlaunch.run.records import EvaluationResult, MergeResult, TrainingResult
from ftlaunch.safety.redact import redact

NAME = "README.md"
OURS = "  - ftlaunch\n"
"""A line of the front matter by which a card is known as one of these."""
TEMPLATE = "[More Information Needed]"
"""What PEFT's own card, which nobody has filled in, is full of."""
PLACE = re.compile(r"(?<![\w:/.~])~?/(?:[\w.+@-]+/)+")
"""Folders of an absolute path, which are left out: where things lie on a machine is nobody's business."""
KNOWN_LICENCES = {
    "HuggingFaceTB/SmolLM2": "apache-2.0",
    "meta-llama/Llama-2": "llama2",
    "meta-llama/Meta-Llama-3-": "llama3",
    "meta-llama/Llama-3.1": "llama3.1",
    "meta-llama/Llama-3.2": "llama3.2",
    "google/gemma-2b": "gemma",
    "google/gemma-7b": "gemma",
    "google/gemma-2-": "gemma",
    "google/gemma-3-": "gemma",
    "mistralai/Mistral-7B": "apache-2.0",
    "mistralai/Mixtral-8x7B": "apache-2.0",
    "Qwen/Qwen3": "apache-2.0",
    "openai-community/gpt2": "mit",
}
"""Beginnings of hub ids → licences by the hub's names, as their owners publish them."""


def write_cards(run: RunDir, facts: RunFacts) -> list[Path]:
    """Write the card of everything that a run has made; those that a person has written stay. Returns the cards."""
    written: list[Path] = []
    for stage in facts.stages:
        folder = run.stage_dir(stage.status.name)
        for made in (folder.artifact, folder.model):
            path = made / NAME
            if made.is_dir() and stage.result is not None and _is_free(path):
                write_atomic(path, card(facts, stage, made))
                written.append(path)
    return written


def _is_free(path: Path) -> bool:
    """Whether a card may be written there: there is none, one of ours, or one that nobody has filled in."""
    if not path.exists():
        return True
    text = path.read_text(errors="replace")
    return OURS in text.partition("\n---\n")[0] + "\n" or TEMPLATE in text


def card(facts: RunFacts, stage: StageFacts, made: Path) -> str:
    """The card of what a stage has left in the folder `made`."""
    trainings = [one for one in facts.stages[: facts.stages.index(stage) + 1] if one.is_training]
    text = "\n".join(
        [
            "---",
            *_front_matter(facts, stage, trainings, made),
            "---",
            "",
            f"# {facts.name}",
            "",
            *_introduction(stage, trainings, made),
            *_section("Data", _data(facts, trainings)),
            *_section("Method", _method(facts, trainings)),
            *_section("Results", _results(facts, stage)),
            *_section("Provenance", _provenance(facts)),
            *_section("Licences", _licences(facts)),
        ]
    )
    # Last and over the whole text: any note, key or name may hold a path or a secret.
    return PLACE.sub("", redact(text)) + "\n"


def _section(title: str, lines: Iterable[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""]


def _called(path: str) -> str:
    """A hub id, or the last part of a path."""
    return Path(path).name if is_local(path) else path


def _front_matter(facts: RunFacts, stage: StageFacts, trainings: list[StageFacts], made: Path) -> Iterator[str]:
    is_adapter = (made / "adapter_config.json").exists()
    base = stage.spec.model.path
    if not is_local(base):
        # YAML reads JSON strings. Without quotes, a name such as 1.5 would be a number.
        yield f"base_model: {json.dumps(base)}"
        yield f"base_model_relation: {'adapter' if is_adapter else 'finetune'}"
    if (licence := licence_of(base)) is not None:
        yield f"license: {json.dumps(licence)}"
    yield f"library_name: {'peft' if is_adapter else 'transformers'}"
    if not (made / REWARD_HEAD).exists():
        yield "pipeline_tag: text-generation"
    ids = sorted({data.path for data in _tables(facts, trainings).values() if not is_local(data.path)})
    if ids:
        yield "datasets:"
        yield from (f"  - {json.dumps(name)}" for name in ids)
    yield "tags:"
    yield OURS.rstrip("\n")
    yield from (f"  - {tag}" for tag in dict.fromkeys(one.kind for one in trainings))


def _tables(facts: RunFacts, trainings: list[StageFacts]) -> dict[str, Data]:
    return {name: facts.recipe.data[name] for one in trainings for name in one.spec.data if name in facts.recipe.data}


def _introduction(stage: StageFacts, trainings: list[StageFacts], made: Path) -> Iterator[str]:
    is_adapter = (made / "adapter_config.json").exists()
    what = "An adapter for" if is_adapter else "A model made from"
    if (made / REWARD_HEAD).exists():
        what = f"A reward model: {what[0].lower()}{what[1:]}"
    how = ", then ".join(one.kind for one in trainings)
    merged = ", merged into it" if isinstance(stage.spec.stage, Merge) else ""
    yield f"{what} {_called(stage.spec.model.path)}, trained by {how}{merged} with ftlaunch."
    yield ""
    if (made / REWARD_HEAD).exists():
        return
    library, name = ("peft", "AutoPeftModel") if is_adapter else ("transformers", "AutoModel")
    yield f"```python\nfrom {library} import {name}ForCausalLM\n"
    yield f'model = {name}ForCausalLM.from_pretrained("THIS_REPOSITORY")\n```\n'


def _data(facts: RunFacts, trainings: list[StageFacts]) -> Iterator[str]:
    for name, data in _tables(facts, trainings).items():
        results = [one.result for one in trainings if isinstance(one.result, TrainingResult)]
        counts = next((result.data[name] for result in results if name in result.data), None)
        rows = "" if counts is None else f": {counts.kept:,} of {counts.rows:,} rows, {counts.tokens:,} tokens"
        held = f"; held out for evaluation: {data.test:g}" if data.test else ""
        revision = f" at revision {data.revision}" if data.revision else ""
        yield f"- {_called(data.path)}{revision}{rows}{held}"
    hashes = facts.provenance.get("data", {})
    yield from (f"- SHA-256 of {Path(path).name}: `{digest}`" for path, digest in hashes.items())


def _method(facts: RunFacts, trainings: list[StageFacts]) -> Iterator[str]:
    for one in trainings:
        told = {label: note for label, note in one.notes.items() if label not in ("model", "data", "dtype")}
        yield f"- {one.status.name}: " + "; ".join(f"{label}: {note}" for label, note in told.items())
    yield ""
    yield "Keys of the recipe that are not at their defaults:"
    yield ""
    yield "```toml"
    for key, (value, _) in changed_keys(facts.recipe).items():
        shown = _called(value) if key.endswith("path") and isinstance(value, str) else value
        yield f"{key} = {json.dumps(shown, ensure_ascii=False)}"
    yield "```"


def _results(facts: RunFacts, stage: StageFacts) -> Iterator[str]:
    place = facts.stages.index(stage)
    # An evaluation runs after the stage that it measures, so later ones belong to the results as well.
    later = [one for one in facts.stages[place + 1 :] if one.kind == "evaluate"]
    rows = [row for one in (*facts.stages[: place + 1], *later) for row in _measured(one)]
    if not rows:
        yield "Nothing was held out to measure by."
    else:
        yield "| stage | measure | value |"
        yield "| --- | --- | --- |"
        yield from (f"| {name} | {measure} | {value} |" for name, measure, value in rows)


def _measured(stage: StageFacts) -> Iterator[tuple[str, str, str]]:
    name = stage.status.name
    if stage.is_training:
        if stage.trained and (loss := stage.trained[-1].get("loss")) is not None:
            yield name, "loss of the last step", f"{loss:.4g}"
        last: dict[str, Any] = dict(stage.evaluated[-1]) if stage.evaluated else {}
        for key, value in last.items():
            if key.startswith("eval/") and isinstance(value, int | float):
                # A | would end the cell of the Markdown table.
                yield name, key.removeprefix("eval/").replace("|", "/") + ", held out", f"{value:.4g}"
    match stage.result:
        case EvaluationResult() as result:
            for metric, score in result.scores.items():
                low, high = result.intervals.get(metric, (None, None))
                between = "" if low is None else f" ({low:.4g} to {high:.4g})"
                value = "not finite" if score is None else f"{score:.4g}{between}"
                yield name, f"{metric} on {result.examples} examples", value
        case MergeResult() as result:
            yield name, "KL from the adapter model, nats per token", f"{result.kl:.2g}"
        case _:
            return


def _provenance(facts: RunFacts) -> Iterator[str]:
    told = facts.provenance
    yield f"- seed {facts.recipe.seed}"
    if told.get("commit"):
        changed = ", with uncommitted changes" if told.get("diff_sha256") else ""
        yield f"- recipe at commit {told['commit']}{changed}"
    if packages := told.get("packages"):
        yield "- " + ", ".join(f"{name} {version}" for name, version in packages.items())
    if told.get("python"):
        yield f"- Python {told['python']} on {told.get('platform', 'an unknown platform')}"
    yield from (f"- base, SHA-256 of {Path(path).name}: `{digest}`" for path, digest in told.get("base", {}).items())


def _licences(facts: RunFacts) -> Iterator[str]:
    base = facts.recipe.model.path
    yield f"- base, {_called(base)}: {licence_of(base) or 'not known; look at its own card'}"
    for data in facts.recipe.data.values():
        yield f"- data, {_called(data.path)}: {licence_of(data.path) or 'not known; look at its own card'}"


def licence_of(path: str) -> str | None:
    """The licence of a base or a data set: as the card in its folder says, or as well-known ones are published."""
    if not is_local(path):
        return next((licence for begin, licence in KNOWN_LICENCES.items() if path.startswith(begin)), None)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    try:
        lines = (folder / NAME).read_text(errors="replace").splitlines()
    except OSError:
        return None
    if not lines or lines[0] != "---":
        return None
    head = lines[1 : lines.index("---", 1)] if "---" in lines[1:] else []
    # `license: apache-2.0`, perhaps in quotes. A list in the lines below leaves nothing after the colon.
    found = (line.partition(":")[2].strip().strip("\"'") for line in head if line.startswith("license:"))
    return next((licence for licence in found if licence), None)
