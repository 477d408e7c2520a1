"""From the command to the job id: `ftlaunch run --cluster dev` beside bare `sbatch` of the same script."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROUNDS = 7
RECIPE = """\
name = "submit"
model.path = "org/model"
[data.q]
path = "q.jsonl"
prompt = "{q}"
completion = "{a}"
[[stage]]
kind = "sft"
data = "q"
"""
CONF = {"SLURM_CONF": "/tmp/ftlaunch-devcluster/slurm.conf"}


def main() -> None:
    """Print both medians and what ftlaunch adds to sbatch. The devcluster must be up."""
    ours: list[float] = []
    theirs: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "r.toml").write_text(RECIPE)
        (folder / "q.jsonl").write_text('{"q": "2+2", "a": "4"}\n')
        for number in range(ROUNDS):
            run = folder / f"run{number}"
            begun = [sys.executable, "-m", "ftlaunch", "run", str(folder / "r.toml")]
            ours.append(_seconds([*begun, "--cluster", "dev", "--run-dir", str(run), "--set", "parallel.device=cpu"]))
            script = next(run.glob("01-sft/jobs/*_submission.sh"))
            theirs.append(_seconds(["sbatch", "--hold", str(script)]))
            subprocess.run(["scancel", "--name=submit/01-sft"], env=os.environ | CONF, check=True)
    added = median(ours) - median(theirs)
    print(f"ftlaunch run  {median(ours):.3f} s\nsbatch        {median(theirs):.3f} s\nadded         {added:.3f} s")
    print(f"ratio {median(theirs) / median(ours):.2f}")


def _seconds(command: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(command, env=os.environ | CONF, capture_output=True, check=True)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
