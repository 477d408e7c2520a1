"""Runs the stages of a written run on this machine, one after another."""

import math
import socket
import time
from contextlib import nullcontext
from functools import partial

from ftlaunch.backend import runs, supervisor, watchdog
from ftlaunch.backend.display import Display
from ftlaunch.backend.driving import Driven, StageDriver
from ftlaunch.backend.folders import write_files
from ftlaunch.backend.watchdog import HangWatch
from ftlaunch.errors import UserError
from ftlaunch.plan.plan import Plan, PlannedStage
from ftlaunch.processes.signals import StopSignals
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import RunDir
from ftlaunch.run.progress import MetricsTail, duration, read_preparing

LOOPBACK_SECONDS = 5.0


class Local(Driven):
    """Runs whose stages are processes of this machine."""

    def drive_stages(self, run: RunDir, display: Display, interrupts: StopSignals | None) -> int:
        """Run the unfinished stages here, one after another, and return the exit code.

        UserError where something to be mended keeps a stage from starting.
        """
        plan = runs.read_plan(run)
        require_loopback(plan)
        with nullcontext(interrupts) if interrupts else StopSignals() as heard:
            return _Driver(run, display, heard).run_unfinished(plan)

    def require_nodes(self, plan: Plan) -> None:
        """UserError where a plan asks for more than this machine is."""
        nodes = max(planned.spec.parallel.nodes for planned in plan.stages)
        if nodes > 1:
            raise UserError(
                f"the recipe asks for {nodes} nodes, and this is one machine",
                "several nodes need a cluster: name one with --cluster; or use --nodes 1",
            )
        require_loopback(plan)


def require_loopback(plan: Plan) -> None:
    """UserError where several processes are to meet at 127.0.0.1, and it cannot be reached: torch tries for long."""
    if max(planned.spec.world_size for planned in plan.stages) == 1:
        return
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=LOOPBACK_SECONDS).close()
    except OSError as error:
        message = (
            f"several processes meet at 127.0.0.1, which cannot be reached on this machine ({error.strerror or error})"
        )
        remedy = "have it set up (`ip link set lo up`, `ip address add 127.0.0.1/8 dev lo`), or use --procs-per-node 1"
        raise UserError(message, remedy) from error


class _Driver(StageDriver):
    def run_stage(self, planned: PlannedStage) -> int:
        stage_dir = self.run.stage_dir(planned.name)
        if self._is_asked_to_stop():
            return self.stopped(stage_dir, "not started, as asked")
        # What can be refused is refused first: a missing program leaves no empty attempt.
        variables = supervisor.environment(planned)
        write_files(self.run, planned)
        attempt = stage_dir.new_attempt()
        count = planned.spec.world_size
        self.display.say(f"{stage_dir.name}  attempt {attempt.number}, {count} process{'es' if count > 1 else ''}")
        began = time.time()
        metrics = MetricsTail(stage_dir.metrics, since=began)
        # With an infinite floor a step may take any time on a user's own machine: the only hang is a rank that is
        # stopped while the others wait for it.
        watch = HangWatch(stage_dir, math.inf, partial(watchdog.one_holds_up_others, attempt, range(count)))
        has_said = False

        def poll() -> supervisor.Order:
            """Show metrics, pass on what signals ask for, notice a hang: all along while the stage runs."""
            nonlocal has_said
            self.display.show(metrics.read())
            if preparing := read_preparing(stage_dir.preparing):
                self.display.prepare(preparing.describe())
            # Ranks have sessions of their own, so a Ctrl-C never reaches them: the file passes it on.
            if self.interrupts.wish == "stop" and not stage_dir.stop.exists():
                stage_dir.stop.touch()
            if not has_said and stage_dir.stop.exists():
                has_said = True
                again = "; Ctrl-C again to kill" if self.interrupts.by_keyboard else ""
                self.display.say(f"{stage_dir.name}  saving and stopping{again}")
            if silent := watch.poll():
                states = watchdog.interrogate(attempt, socket.gethostname(), range(count))
                write_json(attempt.error, watchdog.failure(attempt, silent, states))
                return "kill"
            return "kill" if self.interrupts.wish == "kill" else "go on"

        with self.display.stage(stage_dir.name):
            outcome = supervisor.run_attempt(planned, stage_dir, attempt, variables, poll)
            # The last steps come after the last poll.
            self.display.show(metrics.read())
        took = duration(time.time() - began)
        if outcome is None:
            return self.stopped(stage_dir, f"killed after {took}; what was not saved is lost")
        return self.report(stage_dir, outcome, took)

    def _is_asked_to_stop(self) -> bool:
        """Whether a signal or a stop file asks for it; stop files from before are gone, removed by the lock's taker."""
        return self.interrupts.wish != "go on" or any(stage_dir.stop.exists() for stage_dir in self.run.stage_dirs())
