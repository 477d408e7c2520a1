"""Work that needs torch, handed to the trainer's tools in a process of their own."""

import subprocess
import sys
import tempfile
from pathlib import Path

from ftlaunch.processes.environment import QUIET, inherited, require_trainer
from ftlaunch.run.files import write_json
from ftlaunch.tools import ToolOptions


def call(options: ToolOptions) -> int:
    """Run the tool that the options are for with this interpreter, and return its exit code. UserError without torch.

    Only its own words are seen.
    """
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
