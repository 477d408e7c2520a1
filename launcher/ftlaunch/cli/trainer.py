"""Work that needs torch, handed to the trainer's modules in a process of their own."""

import subprocess
import sys
from importlib.util import find_spec

from ftlaunch.errors import UserError


def require() -> None:
    """UserError where the trainer's packages are not installed beside this interpreter."""
    if find_spec("torch") is None:
        raise UserError(f"torch is not installed for {sys.executable}", "pip install 'ftlaunch[train]'")


def call(module: str, *arguments: str) -> int:
    """Run `python -m MODULE ARGUMENTS` with this interpreter and return its exit code. UserError without torch."""
    require()
    return subprocess.call([sys.executable, "-P", "-m", module, *arguments])
