"""A shell on the node of a rank, inside the job that trains there."""

from ftlaunch.backend import runs
from ftlaunch.backend.slurm import queue
from ftlaunch.backend.slurm.messages import read_made_by
from ftlaunch.errors import UserError
from ftlaunch.run.layout import RunDir


def command(run: RunDir, rank: int, words: list[str], *, terminal: bool) -> list[str]:
    """The srun that runs words, or a shell where there are none, on the node of a rank of the run's newest attempt.

    UserError where no job of the run works, or where it has no such rank.
    """
    step = runs.first_unfinished(run)
    attempts = step.all_attempts() if step else []
    made_by = read_made_by(attempts[-1]) if attempts else None
    alive = {id for id, entry in queue.read_queue(run).items() if entry.state == "RUNNING"}
    if step is None or made_by is None or made_by.job not in alive:
        raise UserError(f"no job of {run.path.name} trains", f"see how it stands: ftlaunch status {run.path}")
    parallel = step.read_spec().parallel
    node = rank // parallel.procs_per_node
    process = attempts[-1].on_node(node).process
    if rank not in range(parallel.world_size) or not process.exists():
        raise UserError(f"{step.name} has no rank {rank} at work", f"ranks are 0 to {parallel.world_size - 1}")
    # By its number in the job, as SLURM may call a node otherwise than that calls itself.
    where = [f"--jobid={made_by.job}", "--overlap", "--nodes=1", "--ntasks=1", f"--relative={node}"]
    return ["srun", *where, f"--chdir={run.path}", *(["--pty"] if terminal else []), *(words or ["bash", "-i"])]
