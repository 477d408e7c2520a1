"""Measuring how long each rank works at a step by itself: the launcher tells from it who keeps the others waiting."""

import contextlib
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch

from ftlaunch.run.files import file_by_rename
from ftlaunch.run.pace import Pace
from fttrain.distributed.world import World

STEPS, SECONDS = 4, 5.0
"""Between two records at least: a shared disk is not asked at each step, and rows of one step differ in length."""


class PaceLog:
    """The work of each rank without its waits for others; main writes means of it, where there is a `path`.

    Ranks tell each other what the step before took by a collective that the loop needs anyway. Under ZeRO-3 they wait
    for each other within a forward pass, so that only their work on rows tells them apart.
    """

    def __init__(self, world: World, path: Path | None) -> None:
        self._world, self._path = world, path if world.is_main else None
        self._mine = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._sums: list[float] = [0.0] * world.size
        self._steps = 0
        self._since = time.monotonic()

    @contextmanager
    def working(self) -> Generator[None]:
        """Within, this rank works and waits for no other."""
        if self._world.size == 1:
            yield
            return
        if self._world.device.type == "cuda":
            # The GPU works on while the host is past the end, so it has to note both ends itself.
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._spans.append((begin, end))
            return
        started = time.perf_counter()
        yield
        self._mine += time.perf_counter() - started

    def told(self) -> list[float]:
        """Return what this rank did since the last call, in seconds, at its own place among zeros; [] where it is
        alone. On a GPU the step must be over."""
        if self._world.size == 1:
            return []
        mine = self._mine + sum(begin.elapsed_time(end) / 1000 for begin, end in self._spans)
        self._mine, self._spans = 0.0, []
        return [mine if rank == self._world.rank else 0.0 for rank in range(self._world.size)]

    def note(self, step: int, seconds: list[float]) -> None:
        """Take in what all ranks told of the step before this one."""
        if not any(seconds):
            self._since = time.monotonic()
            return
        self._sums = [total + own for total, own in zip(self._sums, seconds, strict=True)]
        self._steps += 1
        passed = time.monotonic() - self._since
        if self._path is None or self._steps < STEPS or passed < SECONDS:
            return
        means, hosts = [total / self._steps for total in self._sums], [host for host, _ in self._world.peers]
        pace = Pace(step=step - 1, seconds=means, whole=passed / self._steps, hosts=hosts)
        self._sums, self._steps, self._since = [0.0] * self._world.size, 0, time.monotonic()
        with contextlib.suppress(OSError), file_by_rename(self._path, durable=False) as file:
            file.write(msgspec.json.encode(pace))  # a failing disk is reported by whoever writes checkpoints
