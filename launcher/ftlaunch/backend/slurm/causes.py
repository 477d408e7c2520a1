"""What an attempt died of, in words that name rank and node: also one whose first node was lost and could not say it.

Of that one the run's folder tells, and nothing else is asked: neither controller nor accounting need answer.
"""

from collections.abc import Collection, Sequence

from ftlaunch.backend.slurm import paths
from ftlaunch.backend.slurm.messages import MadeBy, read_made_by, read_verdict
from ftlaunch.backend.slurm.restart_policy import is_peer_error
from ftlaunch.processes.outcome import Failure, read_failure
from ftlaunch.recipe.stages import Parallel
from ftlaunch.run.files import why_unwritable
from ftlaunch.run.layout import Attempt

LOST = "NodeLost"
"""Type of the failure of an attempt whose first node has left no word."""


def describe(failure: Failure, nodes: Sequence[str], lost: Collection[str], parallel: Parallel) -> str:
    """A line that says which rank failed, on which node and of what; first of all, which nodes do not answer."""
    what = failure.message.partition("\n")[0]
    if failure.rank is not None:
        kind = "" if failure.user_error or failure.type in what else f"{failure.type}: "
        number = failure.rank // parallel.procs_per_node
        where = f" on {nodes[number]}" if number < len(nodes) and nodes[number] not in what else ""
        what = f"rank {failure.rank}{where}: {kind}{what}"
    return f"no word from {', '.join(lost)}; {what}" if lost else what


def of_cut_off(attempt: Attempt, now: Collection[str] = ()) -> Failure | None:
    """What ended an attempt that its own job could not conclude; None where it has saved, or was concluded.

    `now`: the nodes of the start that follows, where there is one.
    """
    made_by, said = read_made_by(attempt), read_failure(attempt)
    if made_by is None or paths.ended(attempt).exists() or attempt.stopped.exists():
        return None
    # Peers of a dead node report broken connections; that it is dead is the cause.
    if said is not None and not is_peer_error(said):
        return said
    log = str(paths.job_output(attempt.stage_dir, made_by.job))
    if why := why_unwritable(attempt.path):
        return Failure(rank=None, type="OSError", message=f"{attempt.path} cannot be written: {why}", log=log)
    silent = silent_nodes(attempt, made_by)
    spoke = [name for name in made_by.nodes if name not in silent]
    # An older version has not written down which nodes there were.
    message = f"no word from {', '.join(silent) or 'its first node'}: lost, or all that ran there was killed at once"
    if spoke:
        message += f"; {', '.join(spoke)} answered"
    if now and (gone := [name for name in silent if name not in now]):
        message += f"; the next start is without {', '.join(gone)}"
    remedy = "`sinfo -R` and `scontrol show node` tell how SLURM sees a node, and its own log why it died"
    return Failure(rank=None, type=LOST, message=message, remedy=remedy, log=log)


def silent_nodes(attempt: Attempt, made_by: MadeBy) -> list[str]:
    """Nodes of an attempt that have not said how their processes ended; the first one says it by concluding it."""
    return [name for number, name in enumerate(made_by.nodes) if not number or not read_verdict(attempt, number)]
