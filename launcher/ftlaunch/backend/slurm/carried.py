"""What the stages' processes are given of the shell that submits them, and what of it SLURM's commands are not."""

import os
import re

import msgspec

from ftlaunch.backend.slurm import paths
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.processes.environment import inherited
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import RunDir
from ftlaunch.safety.redact import names_secret

CARRIED = re.compile(
    r"(HF|HUGGING_FACE|TRANSFORMERS|TOKENIZERS|TORCH|PYTORCH|TRITON|NCCL|GLOO|UCX|FI|OMP|MKL|CUDA|DS_(BUILD|SKIP)|XDG"
    r"|WANDB)_[A-Z0-9_]+|LD_LIBRARY_PATH|(https?|no)_proxy|(HTTPS?|NO)_PROXY|SSL_CERT_(FILE|DIR)"
)
"""Variables that matter to the stages' processes, but for secrets. They travel in a file of the run's folder."""


def carried() -> dict[str, str]:
    """Variables of this process that stages are given, with absolute paths."""
    variables = inherited()
    # HF_TOKEN also matches CARRIED; secrets reach the nodes by the user's own login files instead.
    return {name: variables[name] for name in sorted(variables) if CARRIED.fullmatch(name) and not names_secret(name)}


def keep(run: RunDir) -> None:
    """Write them down for the stages of a run."""
    write_json(paths.environment(run), carried())


def kept(run: RunDir, cluster: Cluster) -> dict[str, str]:
    """Those of the shell that a run was submitted from, and what keeps its nodes from the hub if they are offline."""
    variables = msgspec.json.decode(paths.environment(run).read_bytes(), type=dict[str, str])
    return variables | ({"HF_HUB_OFFLINE": "1"} if cluster.offline else {})


def not_heeded() -> str | None:
    """A line about variables that would have sbatch ask for something else than was planned; None where none is set."""
    # sbatch lets SBATCH_PARTITION override the script's #SBATCH line, so `submitting_to` hides such variables.
    if not (found := sorted(name for name in os.environ if name.startswith("SBATCH_"))):
        return None
    one = len(found) == 1
    return f"{', '.join(found)} of this shell {'is' if one else 'are'} not heeded: say it in the profile, or by --site"
