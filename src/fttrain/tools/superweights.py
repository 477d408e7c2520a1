"""`ftlaunch superweights`: the super weights of a model, and what it loses without each."""

import json
from collections.abc import Iterator
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftlaunch.recipe.model import Model
from ftlaunch.tools import SuperweightsOptions
from fttrain.evaluation import perplexity as texts
from fttrain.model.scorer import load_base, load_tokenizer
from fttrain.superweights import ablate, known
from fttrain.superweights.find import PROMPT, Found, attention_spikes, find
from fttrain.superweights.projections import down_projections, unseen
from fttrain.tools.output import run

RANDOM = 100
"""Weights of like size that are zeroed for comparison."""
SEED = 0
LENGTH, WINDOWS = 256, 4
"""Tokens in a window of text, and how many: enough for what differs by far more than its error."""
COLUMNS = ("layer", "row", "column", "weight", "input", "output", "share")


def main(options: SuperweightsOptions) -> Iterator[str]:
    """Yield what was found."""
    report = _report(options)
    yield json.dumps(report, indent=2) if options.json else _text(report)


def _report(options: SuperweightsOptions) -> dict[str, Any]:
    """Everything that was asked for, as plain values; the plots and the same report as a file are in `options.out`."""
    tokenizer = load_tokenizer(options.model)
    model: Any = load_base(Model(path=options.model), dtype=torch.float32, packing=False).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    found = find(model, ids, options.limits)
    windows = texts.windows(tokenizer, options.text, length=LENGTH, count=WINDOWS)
    report: dict[str, Any] = {
        "model": options.model,
        "computed_in": "fp32",  # bf16 would round away what single weights change
        "weights": [*map(asdict, found.weights)],
        "unexplained": [*map(asdict, found.unexplained)],
        "spikes": [*map(asdict, found.spikes)],
        "unseen": unseen(model),
        "published": _published(options.model, found),
        "perplexity": _perplexities(model, found, windows, options),
    }
    if options.attention_spikes:
        report["attention_spikes"] = [*map(asdict, attention_spikes(model, ids, options.limits))]
    _save(report, found, Path(options.out))
    return report


def _perplexities(model: Any, found: Found, windows: list[Tensor], options: SuperweightsOptions) -> dict[str, Any]:
    down, places = down_projections(model), found.places
    told: dict[str, Any] = {"original": texts.perplexity(model, windows)}
    if not places:
        return told
    told["without_each"] = [ablate.at_scale(model, down, [place], windows) for place in places]
    told["without_all"] = ablate.at_scale(model, down, places, windows)
    others = ablate.random_like(down, places, RANDOM, SEED)
    told["random_weights"] = len(others)
    told["without_random"] = ablate.at_scale(model, down, others, windows)
    if options.ablate:
        told["restored"] = ablate.restored(model, down, places, windows)
        told["scaled"] = {factor: ablate.at_scale(model, down, places, windows, factor) for factor in ablate.SCALES}
    return told


def _published(model: str, found: Found) -> dict[str, Any] | None:
    """Which of the published coordinates were found; None for a model of which none are known."""
    places = known.published(model)
    if not places:
        return None
    return {
        "found": [[*astuple(place)] for place in places if place in found.places],
        "missed": [[*astuple(place)] for place in places if place not in found.places],
    }


def _save(report: dict[str, Any], found: Found, out: Path) -> None:
    from fttrain.superweights import plots  # matplotlib takes a second to load

    out.mkdir(parents=True, exist_ok=True)
    plots.draw(found, out)
    (out / "superweights.json").write_text(json.dumps(report, indent=2))


def _text(report: dict[str, Any]) -> str:
    perplexity = report["perplexity"]
    each = perplexity.get("without_each", [])
    lines = [_row([*COLUMNS, "perplexity without"])] if each else ["no super weights"]
    lines += [
        _row([*(one[name] for name in COLUMNS), value]) for one, value in zip(report["weights"], each, strict=True)
    ]
    lines += ["", f"perplexity {perplexity['original']:.4g}, computed in {report['computed_in']}"]
    if each:
        lines += [
            f"without them all {perplexity['without_all']:.4g}",
            f"without {perplexity['random_weights']} random weights of like size {perplexity['without_random']:.4g}",
        ]
    if "restored" in perplexity:
        lines += [f"without them all, their activations put back {perplexity['restored']:.4g}"]
        lines += [f"all times {factor:g}: {value:.4g}" for factor, value in perplexity["scaled"].items()]
    lines += [report["unseen"]] * bool(report["unseen"])
    lines += [f"spikes that no single weight explains: {_layers(report['unexplained'])}"] * bool(report["unexplained"])
    if "attention_spikes" in report:
        lines += [f"spikes of attention outputs: {_layers(report['attention_spikes']) or 'none'}"]
    if report["published"]:
        lines += [f"published: {key} {value}" for key, value in report["published"].items()]
    return "\n".join(lines)


def _layers(spikes: list[dict[str, Any]]) -> str:
    return ", ".join(f"{one['module']} ({one['output']:.4g} at {one['row']})" for one in spikes)


def _row(cells: list[Any]) -> str:
    return "  ".join(f"{cell if not isinstance(cell, float) else format(cell, '.4g'):>9}" for cell in cells)


if __name__ == "__main__":
    run(main, SuperweightsOptions)
