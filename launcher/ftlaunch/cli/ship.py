"""Verbs that take what a run has made somewhere else: to the hub, or into another format."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

from ftlaunch.cli.model import resolve_folder
from ftlaunch.errors import UserError
from ftlaunch.processes import trainer
from ftlaunch.tools import PushOptions

CONVERTER = "convert_hf_to_gguf.py"
"""llama.cpp's own program."""
Source = Annotated[str, typer.Argument(metavar="RUN|FOLDER", help="A run, or the folder of a model or an adapter.")]


def push(
    source: Source,
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub; created if it does not exist.")
    ],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a run, send the adapter instead of the merged model.")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Branch to send it to.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be sent.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Send without asking.")] = False,
) -> None:
    """Upload a model or an adapter to the Hugging Face hub.

    Example: ftlaunch push my-run me/my-model --dry-run
    """
    folder = _made(source, merged=not adapter)
    told = PushOptions(folder=folder, repository=repository, public=public, revision=revision, dry_run=True)
    if dry_run or not yes:
        code = trainer.call(told)
        if code or dry_run:
            raise typer.Exit(code)
        if not sys.stdin.isatty():
            raise UserError("push sends nothing without being asked", "add --yes")
        typer.confirm(f"Send this to {repository}?", abort=True, err=True)
    raise typer.Exit(trainer.call(msgspec.structs.replace(told, dry_run=False)))


def export(
    source: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="File to write.")],
    outtype: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "auto"], typer.Option(help="Format of the weights.")
    ] = "auto",
) -> None:
    """Convert a merged model to GGUF with llama.cpp.

    Example: ftlaunch export my-run my-run.gguf --outtype q8_0
    """
    folder = _made(source, merged=True)
    if not (Path(folder) / "config.json").exists():
        raise UserError(f"{folder} is no whole model", f"merge it first: ftlaunch merge {shlex.quote(source)} merged")
    if out.exists():
        raise UserError(f"{out} exists", "name another file, or remove it")
    converter = _converter()
    arguments = [folder, "--outfile", str(out), "--outtype", outtype]
    if converter is None:
        line = shlex.join(["python", f"llama.cpp/{CONVERTER}", *arguments])
        remedy = f"set LLAMA_CPP to its folder, or run it yourself: {line}"
        raise UserError(f"llama.cpp's {CONVERTER} is not found", remedy)
    raise typer.Exit(subprocess.call([sys.executable, str(converter), *arguments]))


def _converter() -> Path | None:
    """llama.cpp's converter: in the folder that LLAMA_CPP names, else on the PATH."""
    named = Path(os.environ.get("LLAMA_CPP", "")) / CONVERTER
    if os.environ.get("LLAMA_CPP") and named.is_file():
        return named
    found = shutil.which(CONVERTER)
    return None if found is None else Path(found)


def _made(source: str, *, merged: bool) -> str:
    """The folder that a run has left or that is named, with its card in it."""
    from ftlaunch.backend import runs
    from ftlaunch.report.facts import read_run
    from ftlaunch.report.model_card import write_cards

    folder = resolve_folder(source, merged=merged)
    if (run := runs.look_for(source)) is not None:
        write_cards(run, read_run(run))
    return folder
