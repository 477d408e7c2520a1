"""From the command to the job id: `ftlaunch run --cluster dev` against bare `sbatch` of the same script."""

import os
import resource
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
CONF = {"SLURM_CONF": "/tmp/ftlaunch-devcluster/slurm.conf", "PYTHONDONTWRITEBYTECODE": ""}
"""The second, which a build machine may set, would have every start compile what a user's Python has compiled once."""


def main() -> None:
    """Print both medians and what ftlaunch adds to sbatch. The devcluster must be up."""
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
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
    (ours_took, ours_used), (theirs_took, theirs_used) = _medians(ours), _medians(theirs)
    print(f"ftlaunch run  {ours_took:.3f} s, of which {ours_used:.3f} s of a processor")
    print(f"sbatch        {theirs_took:.3f} s, of which {theirs_used:.3f} s of a processor")
    print(f"added         {ours_took - theirs_took:.3f} s\nratio {theirs_took / ours_took:.2f}")


def _medians(of: list[tuple[float, float]]) -> tuple[float, float]:
    return median(took for took, _ in of), median(used for _, used in of)


def _seconds(command: list[str]) -> tuple[float, float]:
    """How long a command took, and for how long of it a processor worked: other things may run on this machine."""
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=os.environ | CONF, capture_output=True, check=True)
    took, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
