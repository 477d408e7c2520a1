"""This machine as a place that runs are started in."""

from ftlaunch.backend.display import Display
from ftlaunch.backend.driving import Driven
from ftlaunch.backend.local import driver
from ftlaunch.plan.plan import Plan
from ftlaunch.processes.signals import StopSignals
from ftlaunch.run.layout import RunDir


class Local(Driven):
    """Runs whose stages are processes of this machine."""

    def drive_stages(self, run: RunDir, display: Display, interrupts: StopSignals | None) -> int:
        """Run the unfinished stages here, one after another, and return the exit code."""
        return driver.drive(run, display, interrupts)

    def require_nodes(self, plan: Plan) -> None:
        """UserError where a plan asks for more than this machine."""
        driver.require_machine(plan)
