"""A shell on the node of a rank, inside the job that trains there."""

from ftlaunch.backend import runs
from ftlaunch.backend.slurm import queue
from ftlaunch.backend.slurm.messages import read_made_by
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import UserError
from ftlaunch.run.layout import RunDir


def command(run: RunDir, rank: int, words: list[str], *, terminal: bool) -> list[str]:
    """The srun that runs words, or a shell where there are none, on the node of a rank of the run's newest attempt.

    UserError where no job of the run works, or where it has no such rank.
    """
    step = runs.first_unfinished(run)
    attempts = step.all_attempts() if step else []
    made_by = read_made_by(attempts[-1]) if attempts else None
    if step is None or made_by is None or not _works(run, made_by.job):
        raise UserError(f"no job of {run.path.name} trains", f"see how it stands: ftlaunch status {run.in_shell}")
    parallel = step.read_spec().parallel
    node = rank // parallel.procs_per_node
    process = attempts[-1].on_node(node).process
    if rank not in range(parallel.world_size) or not process.exists():
        raise UserError(f"{step.name} has no rank {rank} at work", f"ranks are 0 to {parallel.world_size - 1}")
    job, dot, _ = made_by.job.partition(".")
    # By its number in the job, as SLURM may call a node otherwise than that calls itself. A stage on held nodes may
    # have only some of them, and knows them by SLURM's names.
    which = f"--nodelist={made_by.nodes[node]}" if dot else f"--relative={node}"
    where = [f"--jobid={job}", "--overlap", "--nodes=1", "--ntasks=1", which]
    return ["srun", *where, f"--chdir={run.path}", *(["--pty"] if terminal else []), *(words or ["bash", "-i"])]


def _works(run: RunDir, job: str) -> bool:
    """Whether the job of an attempt has its nodes; "1234.5" is step 5 of a job that the user holds."""
    id, dot, _ = job.partition(".")
    entry = queue.show(id, Cluster()) if dot else queue.read_queue(run).get(id)
    return entry is not None and entry.state == "RUNNING"
