"""Verbs that take a model: they are the trainer's work, started from here."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ftlaunch.cli import trainer
from ftlaunch.cli.options import Json
from ftlaunch.errors import UserError


def _made_by(source: str, *, merged: bool) -> str:
    """The folder of what a run has made last, where `source` names a run; else `source` itself. UserError if none."""
    from ftlaunch.watch import made, runs

    if not (runs.is_run(Path(source)) or runs.is_run(runs.HOME / source)):
        return source
    run = runs.find(source)
    path = made.last_made(run, merged=merged)
    if path is None:
        raise UserError(f"{run.path.name} has made no model yet", f"see how it stands: ftlaunch status {run.path}")
    return str(path)


def merge(
    source: Annotated[str, typer.Argument(metavar="RUN|ADAPTER", help="A run, or the folder of an adapter.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the merged model.")],
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option("--dtype", help="Of the merged weights. Default: the base's."),
    ] = None,
) -> None:
    """Fold an adapter into its base model, and check it.

    Example: ftlaunch merge my-run merged
    """
    options = ["--dtype", dtype] if dtype else []
    raise typer.Exit(trainer.call("fttrain.merge", _made_by(source, merged=False), str(out), *options))


def import_gguf(
    model: Annotated[Path, typer.Argument(metavar="MODEL.gguf", exists=True, dir_okay=False, help="A .gguf file.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the model.")],
) -> None:
    """Turn a .gguf file into a model folder that can be trained.

    Example: ftlaunch import SmolLM2-135M-Instruct.Q4_1.gguf smollm2
    """
    raise typer.Exit(trainer.call("fttrain.gguf", str(model), str(folder)))


def chat(
    model: Annotated[list[str], typer.Argument(metavar="MODEL…", help="Runs, model or adapter folders, hub ids.")],
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="What to ask.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Longest answer.")] = 64,
) -> None:
    """Ask one or several models and print their answers.

    Example: ftlaunch chat smollm2 my-run --prompt "Who are you?"
    """
    asked = [_made_by(each, merged=True) for each in model]
    options = ["--prompt", prompt, "--max-new-tokens", str(max_new_tokens)]
    raise typer.Exit(trainer.call("fttrain.chat", *asked, *options))


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
    raise typer.Exit(trainer.call("fttrain.superweights", model, *options))
