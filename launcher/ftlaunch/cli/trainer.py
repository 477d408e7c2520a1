"""Work that needs torch, handed to the trainer's modules in a process of their own."""

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ftlaunch.cli import text
from ftlaunch.errors import UserError

if TYPE_CHECKING:
    from ftlaunch.recipe import Recipe


def require() -> None:
    """UserError where the trainer's packages are not installed beside this interpreter."""
    if find_spec("torch") is None:
        raise UserError(f"torch is not installed for {sys.executable}", "pip install 'ftlaunch[train]'")


def call(module: str, *arguments: str) -> int:
    """Run `python -m MODULE ARGUMENTS` with this interpreter and return its exit code. UserError without torch."""
    require()
    return subprocess.call([sys.executable, "-P", "-m", module, *arguments])


def call_on(recipe: "Recipe", module: str, *arguments: str) -> int:
    """`call` with a file that holds the recipe as the first argument."""
    with tempfile.NamedTemporaryFile("w", prefix="ftlaunch-", suffix=".json") as file:
        file.write(text.as_json(recipe))
        file.flush()
        return call(module, file.name, *arguments)
