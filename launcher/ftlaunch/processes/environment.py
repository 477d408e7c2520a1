"""The environment that the trainer's processes get: the caller's, without what another launcher has left in it."""

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from ftlaunch.errors import UserError

FOREIGN = re.compile(
    r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|(NODE|CROSS)_RANK|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+|PET_\w+"
    r"|ACCELERATE_\w+|FSDP_\w+|MEGATRON_LM_\w+|PARALLELISM_CONFIG_\w+|DS_(?!BUILD_|SKIP_)\w+|DEEPSPEED_\w+"
    r"|OMPI_\w+|PMI_\w+|PMIX_\w+|PRTE_\w+|MPI_LOCAL\w+|MV2_\w+)"
)
"""Variables by which torchrun, accelerate, DeepSpeed and MPI tell their processes who they are and what to do.

A process that finds one believes it: it waits for peers that never come, or divides every loss by a number.
"""
PLACES = re.compile(
    r"(HF|HUGGINGFACE|TRANSFORMERS|XDG|(PY)?TORCH|TORCHINDUCTOR|TRITON|CUDA|WANDB)_(\w+_)?(HOME|CACHE|DIR|PATH)"
    r"|SSL_CERT_(FILE|DIR)|TMPDIR|PYTHONPATH|LD_LIBRARY_PATH"
)
"""Variables that name files and folders."""


QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
"""Keeps what libraries tell their own developers, and their progress bars, off a person's screen.

A variable that is set already is left alone, so that whoever wants to see all of it can.
"""


def inherited() -> dict[str, str]:
    """This process's variables but for those of another launcher.

    Relative paths in them become absolute: stages work in their run's folder, where HF_HOME=cache is another folder.
    """
    kept = {name: value for name, value in os.environ.items() if not FOREIGN.fullmatch(name)}
    return {name: _from_here(value) if PLACES.fullmatch(name) else value for name, value in kept.items()}


def _from_here(paths: str) -> str:
    # Libraries expand ~ themselves, and an empty part has a meaning of its own.
    parts = paths.split(os.pathsep)
    return os.pathsep.join(
        part if part.startswith(("~", "/")) or not part else str(Path(part).absolute()) for part in parts
    )


def require_trainer() -> None:
    """UserError where the trainer's packages are not installed for this interpreter."""
    # Looked for, not imported: importing torch takes seconds, and the launcher never does it.
    if find_spec("torch") is None:
        raise UserError(f"torch is not installed for {sys.executable}", "pip install 'ftlaunch[train]'")
