"""Work that needs torch, handed to the trainer's tools in a process of their own."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ftlaunch.processes.environment import QUIET, inherited, require_trainer
from ftlaunch.run.files import write_json
from ftlaunch.tools import ToolOptions

if TYPE_CHECKING:
    from ftlaunch.cluster.vocabulary import Cluster


def call(options: ToolOptions, cluster: "Cluster | None" = None) -> int:
    """Run the tool that the options are for, here or on a node of a cluster, and return its exit code.

    Here it is run with this interpreter, and only its own words are seen. UserError without torch.
    """
    if cluster is not None:
        from ftlaunch.backend.slurm import tool_job

        return tool_job.call(options, cluster)
    require_trainer()
    # In a file, as options may hold a whole recipe, and arguments can be read by every user of the machine (`ps`).
    with tempfile.TemporaryDirectory(prefix="ftlaunch-") as folder:
        file = Path(folder, "options.json")
        write_json(file, options)
        # -P keeps the working directory off sys.path: a datasets.py of the user's would shadow the library.
        return subprocess.call([sys.executable, "-P", "-m", options.module, str(file)], env=QUIET | inherited())


def ask(module: str, *arguments: str) -> bytes:
    """What `python -m MODULE ARGUMENTS` says on stdout, run with this interpreter. UserError without torch."""
    require_trainer()
    command = [sys.executable, "-P", "-m", module, *arguments]
    return subprocess.run(command, env=QUIET | inherited(), stdout=subprocess.PIPE, check=False).stdout
