"""`ftlaunch quantize`: post-training quantization, and what it costs in perplexity, size and logits."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftlaunch.errors import UserError
from ftlaunch.recipe.model import Model
from ftlaunch.run.files import folder_by_rename, require_empty, write_json
from ftlaunch.tools import QuantizeOptions, SpikeLimits
from fttrain import hub
from fttrain.adapters import coverage, targets
from fttrain.evaluation import perplexity
from fttrain.merging import verify
from fttrain.model.scorer import load_base, load_tokenizer
from fttrain.quant import activations, packing, weights
from fttrain.quant.activations import Activations
from fttrain.quant.grid import Grid
from fttrain.quant.weights import Scheme
from fttrain.superweights.find import PROMPT, find
from fttrain.superweights.projections import Projection
from fttrain.tools.output import run

LENGTH, WINDOWS = 256, 4
"""Tokens in a window of text, and how many windows each of calibration and measurement."""
REPORT = "quantization.json"


@dataclass(frozen=True)
class Loaded:
    """A model in fp32 with what quantization asks of it."""

    model: Any
    tokenizer: Any
    dtype: torch.dtype
    """The format that its weights are stored in."""
    layers: dict[str, Projection]
    """Every linear layer of the text body, by name, but those that choose experts."""
    keep: dict[str, list[tuple[int, int]]]
    """Super weights by layer: rows and columns."""


@dataclass(frozen=True)
class Measured:
    """What is compared: perplexity, and logits of the windows."""

    perplexity: float
    logits: list[Tensor]


def main(options: QuantizeOptions) -> Iterator[str]:
    """Write the quantized model and yield the report on it."""
    report = quantize(options)
    yield json.dumps(report, indent=2) if options.json else _text(report)


def quantize(options: QuantizeOptions) -> dict[str, Any]:
    """Write the quantized model to `options.out`, which appears when it is whole; returns the report as plain values.

    Raises UserError for a model or text that cannot be had, groups that do not fit, or an `out` that is not empty.
    """
    _require_sense(options)
    loaded = _load(options.model, protect=options.protect)
    calibration, windows = _windows(options, loaded.tokenizer)
    # First, as `_write` below quantizes the model in place.
    before = _measure(loaded.model, windows)
    how = _activations(options, loaded, calibration)
    grid = Grid(options.bits, not options.asymmetric)
    scheme = Scheme(options.format, grid, options.granularity, options.group_size, options.calibrator)
    with folder_by_rename(Path(options.out)) as partial:
        bits = _write(loaded, scheme, partial, packed=options.packed)
        after = _measure(loaded.model, windows)
        report: dict[str, Any] = {
            "model": options.model,
            "computed_in": "fp32",  # bf16 would round away what is measured
            "weights": asdict(scheme),
            "protected": {name: places for name, places in loaded.keep.items() if places},
            "original": {"perplexity": before.perplexity, "bytes": _bytes(loaded, None)},
            "quantized": _compared(before, after) | {"bytes": _bytes(loaded, bits), "bytes_on_disk": _on_disk(partial)},
            "bits_per_weight": bits / sum(layer.matrix.numel() for layer in loaded.layers.values()),
        }
        # Last, as hooks stay on the model: weights alone have been measured by then.
        if how:
            columns = {name: [column for _, column in places] for name, places in loaded.keep.items() if places}
            activations.install({name: layer.module for name, layer in loaded.layers.items()}, how, columns)
            report["activations"] = {"bits": how.grid.bits, "granularity": options.activation_granularity}
            report["with_activations"] = _compared(before, _measure(loaded.model, windows))
        write_json(partial / REPORT, report)
    return report


def _require_sense(options: QuantizeOptions) -> None:
    require_empty(Path(options.out))
    if options.packed and options.format in ("nf4", "fp4"):
        raise UserError(f"{options.format} is not stored in packed form", "leave --packed out: transformers packs it")
    if options.format != "int" and (options.calibrator != "min-max" or options.asymmetric):
        remedy = "leave --calibrator and --asymmetric out, or take --format int"
        raise UserError(f"{options.format} has a scale of its own kind, which nothing calibrates", remedy)
    if options.activation_bits is None and options.calibration is not None:
        remedy = "ask for --activation-bits with --activation-granularity tensor, or leave --calibration out"
        raise UserError("weights are calibrated on themselves: the text would not be used", remedy)


def _load(path: str, *, protect: bool) -> Loaded:
    tokenizer = load_tokenizer(path)
    model: Any = load_base(Model(path=path), dtype=torch.float32, packing=False).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    layers = {name: Projection(0, name, model.get_submodule(name)) for name in _names(model)}
    reached = sum(layer.matrix.numel() for layer in layers.values())
    coverage.require_reach(
        model, reached, "quantize", "name a model of dense layers, or write `ftlaunch export --outtype q8_0`"
    )
    keep: dict[str, list[tuple[int, int]]] = {name: [] for name in layers}
    if protect:
        for one in find(model, torch.tensor([tokenizer(PROMPT)["input_ids"]]), SpikeLimits()).weights:
            keep[one.module].append((one.row, one.column))
    return Loaded(model, tokenizer, packing.dtype_of(Path(hub.model_folder(path))), layers, keep)


def _names(model: Any) -> list[str]:
    """Return the names of the text body's linear layers, those that choose experts left out."""
    prefix, body = targets.body_of(model)
    return [
        f"{prefix}{name}"
        for name, module in body.named_modules()
        if isinstance(module, targets.LINEAR) and not targets.CHOOSERS & set(name.split("."))
    ]


def _windows(options: QuantizeOptions, tokenizer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Text to calibrate on and other text to measure on: of one source, what comes first and what comes then."""
    if options.calibration is not None:
        sources = options.calibration, options.text
        first, second = (perplexity.windows(tokenizer, one, length=LENGTH, count=WINDOWS) for one in sources)
        return first, second
    # Measuring on the text that ranges were fitted to would flatter the result.
    both = perplexity.windows(tokenizer, options.text, length=LENGTH, count=2 * WINDOWS)
    half = max(1, len(both) // 2)
    return both[:half], both[half:] or both


@torch.no_grad()
def _measure(model: Any, windows: list[Tensor]) -> Measured:
    return Measured(
        perplexity.perplexity(model, windows),
        # One window of logits is enough for a divergence; all of them would be gigabytes.
        [model(one.to(model.device)).logits[0].float().cpu() for one in windows[:1]],
    )


def _compared(before: Measured, after: Measured) -> dict[str, Any]:
    like = verify.distance(before.logits, after.logits)
    return {
        "perplexity": after.perplexity,
        "kl": like.kl,
        "max_logit_difference": like.max_logit_difference,
        "top1_agreement": like.top1_agreement,
    }


def _activations(options: QuantizeOptions, loaded: Loaded, calibration: list[Tensor]) -> Activations | None:
    if options.activation_bits is None:
        return None
    grid = Grid(options.activation_bits, not options.asymmetric)
    if options.activation_granularity == "token":
        return Activations(grid, {})
    modules = {name: layer.module for name, layer in loaded.layers.items()}
    columns = {name: [column for _, column in places] for name, places in loaded.keep.items() if places}
    return activations.observe(loaded.model, modules, calibration, grid, options.calibrator, columns)


@torch.no_grad()
def _write(loaded: Loaded, scheme: Scheme, folder: Path, *, packed: bool) -> float:
    """Quantize the model in memory and write it; returns the bits that its quantized matrices take."""
    bits, matrices = 0.0, {}
    for name, layer in loaded.layers.items():
        if packed:
            matrices[name] = weights.quantized(layer.matrix.cpu(), scheme, loaded.keep[name])
            made, taken = matrices[name].dequantized(), float(matrices[name].num_bits)
        else:
            made, taken = weights.round_trip(layer.matrix.cpu(), scheme, loaded.keep[name])
        layer.matrix.copy_(made.to(loaded.dtype))  # what is measured is what is stored
        bits += taken
    model = loaded.model
    model.config.dtype = loaded.dtype
    loaded.tokenizer.save_pretrained(folder)
    # Tied weights stand once: converted they would not be seen to be the same.
    apart = {*model.all_tied_weights_keys, *(f"{name}.weight" for name in matrices)}
    rest = {key: tensor.to(loaded.dtype) for key, tensor in model.state_dict().items() if key not in apart}
    if not packed:
        model.save_pretrained(folder, state_dict=rest)
        return bits
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    transposed = {f"{name}.weight" for name in matrices if not isinstance(loaded.layers[name].module, nn.Linear)}
    packing.save(folder, {f"{name}.weight": one for name, one in matrices.items()}, rest, transposed)
    return bits


def _bytes(loaded: Loaded, bits: float | None) -> int:
    """Return the size of the model's weights as stored, with the matrices' own size or, if it is given, in `bits`."""
    width = loaded.dtype.itemsize
    matrices = sum(layer.matrix.numel() for layer in loaded.layers.values())
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    return int(parameters * width if bits is None else (parameters - matrices) * width + bits / 8)


def _on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _text(report: dict[str, Any]) -> str:
    lines = [_row("", "perplexity", "MB", "KL", "same first choice", "max |Δlogit|")]
    lines += [_line(name, report[name]) for name in ("original", "quantized", "with_activations") if name in report]
    kept = sum(map(len, report["protected"].values()))
    lines += ["", f"{report['bits_per_weight']:.4g} bits a quantized weight, scales included"]
    lines += [f"on disk {report['quantized']['bytes_on_disk'] / 1e6:.1f} MB"]
    lines += [f"{kept} super weights kept in float: {', '.join(report['protected'])}"] * bool(kept)
    lines += [f"computed in {report['computed_in']}"]
    return "\n".join(lines)


def _line(name: str, told: dict[str, Any]) -> str:
    size = f"{told['bytes'] / 1e6:.1f}" if "bytes" in told else ""
    cells = [f"{told['perplexity']:.4g}", size]
    if "kl" in told:
        cells += [f"{told['kl']:.3g}", f"{told['top1_agreement']:.1%}", f"{told['max_logit_difference']:.3g}"]
    return _row(name.replace("_", " "), *cells)


def _row(name: str, *cells: str) -> str:
    return "  ".join([f"{name:<16}", *(f"{cell:>17}" for cell in cells)])


if __name__ == "__main__":
    run(main, QuantizeOptions)
