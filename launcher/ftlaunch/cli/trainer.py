"""Work that needs torch, handed to the trainer's modules in a process of their own."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ftlaunch.cli import text
from ftlaunch.processes.environment import QUIET, inherited, require_trainer

if TYPE_CHECKING:
    from ftlaunch.cluster.vocabulary import Cluster
    from ftlaunch.recipe import Recipe


def call(module: str, *arguments: str, cluster: "Cluster | None" = None) -> int:
    """Run `python -m MODULE ARGUMENTS`, here or on a node of a cluster, and return its exit code.

    Here it is run with this interpreter, and only its own words are seen. UserError without torch.
    """
    if cluster is not None:
        from ftlaunch.backend.slurm import tool_job

        return tool_job.call(module, [*arguments], cluster)
    require_trainer()
    return subprocess.call([sys.executable, "-P", "-m", module, *arguments], env=QUIET | inherited())


def ask(module: str, *arguments: str) -> bytes:
    """What `python -m MODULE ARGUMENTS` says on stdout, run with this interpreter. UserError without torch."""
    require_trainer()
    command = [sys.executable, "-P", "-m", module, *arguments]
    return subprocess.run(command, env=QUIET | inherited(), stdout=subprocess.PIPE, check=False).stdout


def call_on(recipe: "Recipe", module: str, *arguments: str, cluster: "Cluster | None" = None) -> int:
    """`call` with a file that holds the recipe as the first argument."""
    here = None if cluster is None else Path.cwd()  # nodes see this folder, and no other's /tmp
    with tempfile.NamedTemporaryFile("w", prefix=".ftlaunch-", suffix=".json", dir=here) as file:
        file.write(text.as_json(recipe))
        file.flush()
        return call(module, file.name, *arguments, cluster=cluster)
