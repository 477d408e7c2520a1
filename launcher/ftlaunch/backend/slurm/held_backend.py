"""Nodes that the user holds by salloc or sbatch already, as a place that runs are started in."""

from ftlaunch.backend import runs
from ftlaunch.backend.display import Display
from ftlaunch.backend.driving import Driven
from ftlaunch.backend.slurm import held, paths
from ftlaunch.plan.plan import Plan
from ftlaunch.processes.signals import StopSignals
from ftlaunch.run.layout import RunDir


class Held(Driven):
    """Runs whose stages are started on held nodes; those that this machine has room for are driven `otherwise`."""

    def __init__(self, otherwise: Driven) -> None:
        self._otherwise = otherwise

    def drive_stages(self, run: RunDir, display: Display, interrupts: StopSignals | None) -> int:
        """Run the unfinished stages, one after another, on the nodes that the run has claimed; the exit code."""
        if paths.held(run).exists():
            return held.drive(run, display, interrupts)
        return self._otherwise.drive_stages(run, display, interrupts)

    def require_nodes(self, plan: Plan) -> None:
        """UserError where a plan asks for more nodes than are held."""
        if held.is_for(plan) is None:
            self._otherwise.require_nodes(plan)

    def choose_nodes(self, run: RunDir) -> None:
        """Note whether the run goes on by held nodes from here."""
        held.claim(run, runs.read_plan(run))
