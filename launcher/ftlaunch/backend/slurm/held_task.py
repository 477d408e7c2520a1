"""A node's part in a stage on nodes that its user holds: `python -m ftlaunch.backend.slurm.held_task FOLDER`."""

import os
import sys
from functools import cached_property
from pathlib import Path

import msgspec

from ftlaunch.backend.slurm import paths
from ftlaunch.backend.slurm.messages import MadeBy
from ftlaunch.backend.slurm.node_task import NodeTask, run_task
from ftlaunch.backend.slurm.restart_policy import AttemptRecord
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.processes.signals import PreemptionSignals
from ftlaunch.run.layout import Attempt, StageDir

STEP_STRIDE = 97
"""Neighbouring steps of a job are so many jobs apart where ports are chosen."""


class HeldTask(NodeTask):
    """The same as for a job of the stage's own, but for the queue: the one that started the tasks starts them again."""

    @cached_property
    def cluster(self) -> Cluster:
        return msgspec.json.decode(paths.held(self.run).read_bytes(), type=Cluster)

    @cached_property
    def made_by(self) -> MadeBy:
        return MadeBy(job=f"{self.slurm.job_id}.{os.environ['SLURM_STEP_ID']}", restart=0, nodes=self.nodes)

    @cached_property
    def jobs(self) -> list[str]:
        return [self.made_by.job]

    @property
    def meeting(self) -> int:
        # All steps of a held job have its id, and runs in two of them may share a node.
        return int(self.slurm.job_id) + STEP_STRIDE * int(os.environ["SLURM_STEP_ID"])

    @property
    def restart(self) -> int:
        return sum(one.in_place for one in self._before())

    def _is_on_record(self) -> bool:
        return True

    def _submit_rest(self) -> None:
        """There is nothing to submit."""

    def _take_over(self) -> str | None:
        """The one that started the tasks sees to the next stage."""

    def _go_back(self, attempt: Attempt, ended: AttemptRecord) -> AttemptRecord:  # noqa: ARG002 (there is no queue to go back to)
        return ended


if __name__ == "__main__":
    # submitit reads the nodes of the job, of which this stage may have been given only some.
    os.environ["SLURM_JOB_NODELIST"] = os.environ["SLURM_STEP_NODELIST"]
    sys.exit(run_task(HeldTask(StageDir(Path(sys.argv[1])), PreemptionSignals())))
