"""Verbs that take a model: they are the trainer's work, started from here."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ftlaunch import tools
from ftlaunch.cli.options import ClusterName, Json, Site, defaults
from ftlaunch.cli.profile import backend_named
from ftlaunch.errors import UserError
from ftlaunch.processes import trainer
from ftlaunch.recipe import names

_CHAT, _SERVE, _QUANTIZE = map(defaults, (tools.ChatOptions, tools.ServeOptions, tools.QuantizeOptions))
_SUPERWEIGHTS, _LIMITS = map(defaults, (tools.SuperweightsOptions, tools.SpikeLimits))


def resolve_model(source: str, *, merged: bool) -> str:
    """The folder of what a run has made last, where `source` names a run; else as `settle_model`. UserError if none."""
    from ftlaunch.backend import runs
    from ftlaunch.run import outputs

    if (run := runs.look_for(source)) is None:
        return settle_model(source)
    path = outputs.newest_output(run, merged=merged)
    if path is None:
        raise UserError(f"{run.path.name} has made no model yet", f"see how it stands: ftlaunch status {run.in_shell}")
    return str(path)


def settle_model(text: str) -> str:
    """The absolute path of a folder, or ID or ID@REVISION of the hub. UserError where it is neither."""
    name, at, revision = text.partition("@")
    if at and revision and names.has_form_of_id(name):
        return text
    settled = names.settle(text, Path.cwd(), "a model folder")
    if told := names.namesake(settled, Path.cwd()):
        print(f"note: {told}", file=sys.stderr)
    return settled


def resolve_folder(source: str, *, merged: bool) -> str:
    """Do the same as `resolve_model` where no hub id can be meant: all but a run is a path."""
    from ftlaunch.backend import runs

    return str(Path(source).absolute()) if runs.look_for(source) is None else resolve_model(source, merged=merged)


def merge(
    source: Annotated[str, typer.Argument(metavar="RUN|ADAPTER", help="A run, or the folder of an adapter.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the merged model.")],
    dtype: Annotated[
        tools.SavedDtype | None, typer.Option(help="Format of the merged weights. Default: the base's.")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(min=0, metavar="NUMBER", help="Largest KL to accept. Default: what rounding explains."),
    ] = None,
    cluster: ClusterName = None,
    site: Site = None,
) -> None:
    """Merge an adapter into its base model, and check the result.

    Example: ftlaunch merge my-run merged
    """
    # The newest output of a run may be a merged model already; merging needs the adapter.
    found = resolve_folder(source, merged=False)
    options = tools.MergeOptions(source=found, out=str(out), dtype=dtype, max_kl=max_kl)
    raise typer.Exit(backend_named(cluster, site).call(options))


def import_model(
    model: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", exists=True, help="A .gguf file, or a folder written by quantize --packed."),
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the model.")],
) -> None:
    """Convert a .gguf file or a packed model to a model folder.

    Example: ftlaunch import SmolLM2-135M-Instruct.Q4_1.gguf smollm2
    """
    # `quantize --packed` writes a folder, while a .gguf is a single file.
    kind = tools.UnpackOptions if model.is_dir() else tools.ImportOptions
    raise typer.Exit(trainer.call(kind(source=str(model), out=str(folder))))


def chat(
    model: Annotated[
        list[str],
        typer.Argument(metavar="MODEL…", help="Runs, model or adapter folders (./DIR), hub ids (ID or ID@REVISION)."),
    ],
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The prompt. Without it: a conversation.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Longest answer, in tokens. Default: 64, in a conversation 512."),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, metavar="T", help="Sampling temperature. 0: always the likeliest token.")
    ] = _CHAT.temperature,
) -> None:
    """Chat with one or several models, or send them one prompt.

    Example: ftlaunch chat ./smollm2 my-run --prompt "Who are you?"
    """
    asked = [resolve_model(each, merged=True) for each in model]
    options = tools.ChatOptions(models=asked, prompt=prompt, max_new_tokens=max_new_tokens, temperature=temperature)
    raise typer.Exit(trainer.call(options))


def serve(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, model or adapter folder, or hub id.")],
    compare: Annotated[str | None, typer.Option(metavar="base|MODEL", help="Serve a second model next to it.")] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on. Beyond this machine clients need a token.")
    ] = _SERVE.host,
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="N", help="Port to listen on.")] = _SERVE.port,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Another host name by which clients reach this server.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Most requests that are answered at the same time.")
    ] = _SERVE.batch_size,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")
    ] = _SERVE.max_new_tokens,
) -> None:
    """Serve a model to a browser and to OpenAI's clients.

    Example: ftlaunch serve my-run --compare base
    """
    options = tools.ServeOptions(
        model=resolve_model(model, merged=compare != "base"),
        compare=compare if compare in (None, "base") else resolve_model(compare, merged=True),
        host=host,
        port=port,
        allow_host=allow_host or [],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    raise typer.Exit(trainer.call(options))


def superweights(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder (./DIR) or hub id.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for two plots and the report.")] = Path(
        _SUPERWEIGHTS.out
    ),
    text: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text or data file to measure perplexity on.")
    ] = None,
    absolute: Annotated[
        float, typer.Option(min=0, metavar="A", help="Least size of a spike. 0: any size.")
    ] = _LIMITS.absolute,
    relative: Annotated[
        float, typer.Option(min=0, metavar="R", help="Least size of a spike, in medians of all layers. 0: any.")
    ] = _LIMITS.relative,
    ablate: Annotated[
        bool,
        typer.Option("--ablate", help="Also restore their activations and scale them, as the paper's ablations do."),
    ] = False,
    attention_spikes: Annotated[
        bool, typer.Option("--attention-spikes", help="Also list layers whose attention output has spikes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Find the single weights that a model depends on.

    Example: ftlaunch superweights ./smollm2
    """
    options = tools.SuperweightsOptions(
        model=settle_model(model),
        out=str(out),
        text=text,
        limits=tools.SpikeLimits(absolute, relative),
        ablate=ablate,
        attention_spikes=attention_spikes,
        json=as_json,
    )
    raise typer.Exit(trainer.call(options))


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder (./DIR) or hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the quantized model and its report.")],
    number_format: Annotated[
        tools.WeightFormat, typer.Option("--format", help="Number format of the weights.")
    ] = _QUANTIZE.format,
    bits: Annotated[int, typer.Option(min=2, max=8, metavar="B", help="Bits of an integer.")] = _QUANTIZE.bits,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Use integers with a zero point.")] = False,
    granularity: Annotated[
        tools.Granularity, typer.Option(help="The weights that share one scale.")
    ] = _QUANTIZE.granularity,
    group_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Number of weights in a group.")
    ] = _QUANTIZE.group_size,
    calibrator: Annotated[
        tools.CalibratorName, typer.Option(help="How the range of values is found.")
    ] = _QUANTIZE.calibrator,
    activation_bits: Annotated[
        int | None, typer.Option(min=2, max=8, metavar="B", help="Also measure with rounded inputs.")
    ] = None,
    activation_granularity: Annotated[
        tools.ActivationGranularity, typer.Option(help="Values that share one scale; tensor is calibrated on text.")
    ] = _QUANTIZE.activation_granularity,
    calibration: Annotated[str | None, typer.Option(metavar="FILE", help="Text or data file to calibrate on.")] = None,
    text: Annotated[str | None, typer.Option(metavar="FILE", help="Text or data file to measure on.")] = None,
    protect: Annotated[bool, typer.Option("--protect", help="Keep super weights in float.")] = False,
    packed: Annotated[bool, typer.Option("--packed", help="Store the integers, for ftlaunch import.")] = False,
    cluster: ClusterName = None,
    site: Site = None,
    as_json: Json = False,
) -> None:
    """Quantize a trained model, and report the loss of quality.

    Example: ftlaunch quantize ./smollm2 smollm2-int4 --protect
    """
    options = tools.QuantizeOptions(
        model=settle_model(model),
        out=str(out),
        format=number_format,
        bits=bits,
        asymmetric=asymmetric,
        granularity=granularity,
        group_size=group_size,
        calibrator=calibrator,
        activation_bits=activation_bits,
        activation_granularity=activation_granularity,
        calibration=calibration,
        text=text,
        protect=protect,
        packed=packed,
        json=as_json,
    )
    raise typer.Exit(backend_named(cluster, site).call(options))
