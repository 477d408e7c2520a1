"""A SLURM of four small programs that keep one queue: its own commands need root, a daemon and a controller."""

import os
import sys
from pathlib import Path

import pytest
from tests.launcher.scripted_runs import write_run

from ftlaunch.backend.slurm import paths
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import RunDir

SBATCH = """\
import os, re, sys
from pathlib import Path
here = Path(__file__).parent
queue = here / "queue"
script = Path(sys.argv[-1])
refused = here / "refused"
known = queue.read_text().splitlines() if queue.exists() else []
if refused.exists() and len(known) >= int(refused.read_text()):
    sys.exit("sbatch: error: Batch job submission failed: Invalid account")
if "--test-only" in sys.argv:
    sys.exit("sbatch: Job 1 to start at once")
told = dict(re.findall(r"^#SBATCH --(job-name|chdir)=(.*)$", script.read_text(), re.M))
name = told["job-name"].strip("'\\"")
waits = [word.partition("=")[2] for word in sys.argv if word.startswith("--dependency=")]
number = str(100 + len(known))
row = [number, "PENDING", "Dependency" if waits else "Priority", "", "N/A", name, told["chdir"], str(script)]
with queue.open("a") as file:
    file.write("\\x1f".join(row) + "\\n")
with (here / "waits").open("a") as file:
    file.write(f"{number} {' '.join(waits)}\\n".replace(" \\n", "\\n"))
print(number)
"""
SQUEUE = """\
from pathlib import Path
queue = Path(__file__).parent / "queue"
print(queue.read_text() if queue.exists() else "", end="")
"""
SCONTROL = """\
import sys
from pathlib import Path
queue = Path(__file__).parent / "queue"
for row in queue.read_text().splitlines() if queue.exists() else []:
    id, state, reason, nodes, start, name, folder, script = row.split("\\x1f")
    if sys.argv[1:] == ["show", "job", id]:
        print(f"JobId={id} JobName={name}\\n   JobState={state} Reason={reason} Dependency=(null)")
        sys.exit(print(f"   StartTime={start} EndTime=Unknown\\n   Command={script}\\n   WorkDir={folder}"))
sys.exit("slurm_load_jobs error: Invalid job id specified")
"""
SCANCEL = """\
import sys
from pathlib import Path
queue = Path(__file__).parent / "queue"
rows = [row.split("\\x1f") for row in queue.read_text().splitlines()]
for row in rows:
    row[1] = "CANCELLED" if row[0] in sys.argv else row[1]
queue.write_text("".join("\\x1f".join(row) + "\\n" for row in rows))
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of those programs, with `queue` and `waits`: what each job waits for. `refused`: from which on."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, program in {"sbatch": SBATCH, "squeue": SQUEUE, "scontrol": SCONTROL, "scancel": SCANCEL}.items():
        file = folder / name
        file.write_text(f"#!{sys.executable} -S\n{program}")
        file.chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of two stages that is to be submitted."""
    run = write_run(tmp_path / "r", "train", "train")
    write_json(paths.cluster(run), Cluster())
    (run.path / "code.json").write_text('{"files": {}}')
    return run
