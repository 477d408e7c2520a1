"""Whether a stage can save in the time that SLURM leaves it: the warning must leave time for a step and a save."""

from bisect import bisect
from itertools import pairwise

from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import UserError
from ftlaunch.plan.plan import Plan
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import RunDir, StageDir


def longest_step(stage_dir: StageDir) -> float | None:
    """Seconds of the longest step so far, with the save or the evaluation after it; None where none was measured."""
    starts = sorted(one.process.stat().st_mtime for one in stage_dir.all_attempts() if one.process.exists())
    times = (entry["time"] for entry in read_jsonl(stage_dir.metrics) if "time" in entry)
    # Between entries of two attempts lies time in the queue, so those pairs are left out.
    pauses = (after - before for before, after in pairwise(times) if bisect(starts, before) == bisect(starts, after))
    return max(pauses, default=None)


def require_time_to_save(run: RunDir, plan: Plan, cluster: Cluster) -> None:
    """UserError where a step of an unfinished stage has taken longer than signal_lead."""
    for planned in plan.stages:
        stage_dir = run.stage_dir(planned.name)
        longest = None if stage_dir.result.exists() else longest_step(stage_dir)
        if longest is not None and longest > cluster.signal_lead:
            took = f"a step and a save have taken {longest:.0f} s, and signal_lead is {cluster.signal_lead} s"
            raise UserError(
                f"{stage_dir.name}: {took}: at a time limit or a preemption nothing could be saved",
                "allow more in the profile, and name it with --cluster",
            )
