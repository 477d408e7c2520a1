"""Verbs that take a model: they are the trainer's work, started from here."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ftlaunch.cli import trainer
from ftlaunch.cli.options import ClusterName, Json, Site
from ftlaunch.cli.profile import load_named
from ftlaunch.errors import UserError


def resolve_model(source: str, *, merged: bool) -> str:
    """The folder of what a run has made last, where `source` names a run; else `source` itself. UserError if none."""
    from ftlaunch.backend import runs
    from ftlaunch.run import outputs

    if not (runs.is_run(Path(source)) or runs.is_run(runs.HOME / source)):
        return source
    run = runs.find(source)
    path = outputs.newest_output(run, merged=merged)
    if path is None:
        raise UserError(f"{run.path.name} has made no model yet", f"see how it stands: ftlaunch status {run.path}")
    return str(path)


def _call(tool: str, cluster: str | None, site: list[str] | None, *arguments: str) -> int:
    """Run one of the trainer's tools, here or on a cluster; its exit code."""
    return trainer.call(f"fttrain.tools.{tool}", *arguments, cluster=load_named(cluster, site))


def merge(
    source: Annotated[str, typer.Argument(metavar="RUN|ADAPTER", help="A run, or the folder of an adapter.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the merged model.")],
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option("--dtype", help="Of the merged weights. Default: the base's."),
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option("--max-kl", min=0, help="Accept such a KL. Default: what rounding explains.")
    ] = None,
    cluster: ClusterName = None,
    site: Site = None,
) -> None:
    """Fold an adapter into its base model, and check it.

    Example: ftlaunch merge my-run merged
    """
    options = (["--dtype", dtype] if dtype else []) + ([] if max_kl is None else ["--max-kl", str(max_kl)])
    raise typer.Exit(_call("merge", cluster, site, resolve_model(source, merged=False), str(out), *options))


def import_model(
    model: Annotated[
        Path, typer.Argument(metavar="SOURCE", exists=True, help="A .gguf file, or a folder of quantize --packed.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the model.")],
) -> None:
    """Turn a .gguf file, or a packed model, into a folder that can be trained.

    Example: ftlaunch import SmolLM2-135M-Instruct.Q4_1.gguf smollm2
    """
    if model.is_dir():
        raise typer.Exit(trainer.call("fttrain.tools.quantize", str(model), str(folder), "--unpack"))
    raise typer.Exit(trainer.call("fttrain.tools.import_gguf", str(model), str(folder)))


def chat(
    model: Annotated[
        list[str], typer.Argument(metavar="MODEL…", help="Runs, model or adapter folders, hub ids (ID or ID@REVISION).")
    ],
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="What to ask. Without it: a conversation.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", min=1, metavar="N", help="Longest answer. Default: 64, in conversation 512."),
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, metavar="T", help="0 takes the likeliest token each time.")
    ] = 0,
) -> None:
    """Talk with one or several models, or ask them one thing.

    Example: ftlaunch chat smollm2 my-run --prompt "Who are you?"
    """
    asked = [resolve_model(each, merged=True) for each in model]
    longest = max_new_tokens or (64 if prompt is not None else 512)
    options = ["--max-new-tokens", str(longest), *(["--temperature", str(temperature)] if temperature else [])]
    options += [] if prompt is None else ["--prompt", prompt]
    raise typer.Exit(trainer.call("fttrain.tools.chat", *asked, *options))


def serve(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="As chat takes one.")],
    compare: Annotated[
        str | None, typer.Option("--compare", metavar="base|MODEL", help="Serve another one beside it.")
    ] = None,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Beyond this machine a token is asked for.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option("--port", min=1, max=65535, metavar="N", help="Port to listen on.")] = 8000,
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", metavar="NAME", help="Another name that this server has.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, metavar="N", help="Requests answered side by side.")
    ] = 8,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Longest answer.")] = 1024,
) -> None:
    """Serve a model to a browser and to OpenAI's clients.

    Example: ftlaunch serve my-run --compare base
    """
    options = ["--host", host, "--port", str(port), "--batch-size", str(batch_size)]
    options += ["--max-new-tokens", str(max_new_tokens)]
    options += [word for name in allow_host or [] for word in ("--allow-host", name)]
    served = resolve_model(model, merged=compare != "base")
    if compare is not None:
        options += ["--compare", compare if compare == "base" else resolve_model(compare, merged=True)]
    raise typer.Exit(trainer.call("fttrain.tools.serve", served, *options))


def superweights(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or hub id.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for two plots and the report.")] = Path(
        "superweights"
    ),
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="Text or data file to measure perplexity on.")
    ] = None,
    absolute: Annotated[float, typer.Option(min=0, metavar="A", help="A spike is larger than A; 0: any size.")] = 50,
    relative: Annotated[
        float, typer.Option(min=0, metavar="R", help="A spike is larger than R times the layers' median; 0: any.")
    ] = 10,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Also put back their activations, and scale them: the paper's ablations.")
    ] = False,
    attention_spikes: Annotated[
        bool, typer.Option("--attention-spikes", help="Also name layers whose attention output spikes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Find the single weights that a model cannot do without.

    Example: ftlaunch superweights smollm2
    """
    options = ["--out", str(out), "--absolute", str(absolute), "--relative", str(relative)]
    options += ["--text", str(text)] if text else []
    flags = {"--ablate": ablate, "--attention-spikes": attention_spikes, "--json": as_json}
    options += [flag for flag, wanted in flags.items() if wanted]
    raise typer.Exit(trainer.call("fttrain.tools.superweights", model, *options))


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the quantized model and its report.")],
    number_format: Annotated[
        Literal["int", "ternary", "nf4", "fp4"], typer.Option("--format", help="What weights become.")
    ] = "int",
    bits: Annotated[int, typer.Option("--bits", min=2, max=8, metavar="B", help="Of an integer.")] = 4,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Integers with a zero point.")] = False,
    granularity: Annotated[
        Literal["tensor", "channel", "group"], typer.Option("--granularity", help="What shares one scale.")
    ] = "group",
    group_size: Annotated[int, typer.Option("--group-size", min=1, metavar="N", help="Weights of a group.")] = 64,
    calibrator: Annotated[
        Literal["min-max", "moving-average", "percentile", "mse", "entropy", "power-of-two"],
        typer.Option("--calibrator", help="How the range of values is chosen."),
    ] = "min-max",
    activation_bits: Annotated[
        int | None,
        typer.Option("--activation-bits", min=2, max=8, metavar="B", help="Measure with rounded inputs, too."),
    ] = None,
    activation_granularity: Annotated[
        Literal["tensor", "token"], typer.Option("--activation-granularity", help="tensor is calibrated on text.")
    ] = "token",
    calibration: Annotated[
        Path | None, typer.Option("--calibration", metavar="FILE", help="Text or data file to calibrate on.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="Text or data file to measure on.")
    ] = None,
    protect: Annotated[bool, typer.Option("--protect", help="Keep super weights in float.")] = False,
    packed: Annotated[bool, typer.Option("--packed", help="Store the integers, for ftlaunch import.")] = False,
    cluster: ClusterName = None,
    site: Site = None,
    as_json: Json = False,
) -> None:
    """Quantize a model after training, and say what it costs.

    Example: ftlaunch quantize smollm2 smollm2-int4 --protect
    """
    told = {
        "--format": number_format,
        "--bits": bits,
        "--granularity": granularity,
        "--group-size": group_size,
        "--calibrator": calibrator,
        "--activation-granularity": activation_granularity,
        "--activation-bits": activation_bits,
        "--calibration": calibration,
        "--text": text,
    }
    options = [str(word) for name, value in told.items() if value is not None for word in (name, value)]
    flags = {"--asymmetric": asymmetric, "--protect": protect, "--packed": packed, "--json": as_json}
    options += [flag for flag, wanted in flags.items() if wanted]
    raise typer.Exit(_call("quantize", cluster, site, model, str(out), *options))
