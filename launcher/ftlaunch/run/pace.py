"""How long each rank of a stage works at a step by itself, and which of them keep the others waiting."""

from statistics import median_low

import msgspec
from msgspec import Struct

from ftlaunch.run.layout import StageDir

SLOW = 1.5
"""Times as long as the median rank works one that is named."""
SHARE = 0.1
"""Share of a step that it costs the others at least."""
NAMED = 3
"""Ranks that are named at most."""


class Pace(Struct, frozen=True, kw_only=True):
    """pace.json: means over some of an attempt's newest steps."""

    step: int
    seconds: list[float]
    """Seconds of a step in which each rank made its rows and computed forward, without a wait for others."""
    whole: float
    """Seconds of a whole step."""
    hosts: list[str]
    """The host of each rank."""

    def stragglers(self) -> list[int]:
        """Return the ranks that keep the others waiting, the slowest first."""
        usual = median_low(self.seconds)
        found = [
            rank for rank, own in enumerate(self.seconds) if own > SLOW * usual and own - usual > SHARE * self.whole
        ]
        return sorted(found, key=lambda rank: -self.seconds[rank])

    def describe(self) -> str | None:
        """One line about the ranks that keep the others waiting; None of none."""
        slow = self.stragglers()
        if not slow:
            return None
        several = len(set(self.hosts)) > 1
        named = [f"rank {rank}" + (f" on {self.hosts[rank]}" if several else "") for rank in slow[:NAMED]]
        more = f" and {len(slow) - NAMED} more" if len(slow) > NAMED else ""
        verb = "keep" if len(slow) > 1 else "keeps"
        times = self.seconds[slow[0]] / max(median_low(self.seconds), 1e-9)
        return f"{', '.join(named)}{more} {verb} the others waiting: {times:.1f} times their work at a step"


def straggling(stage_dir: StageDir) -> str | None:
    """What is said of the ranks that keep the others of the newest attempt waiting; None where none is known to."""
    attempts = stage_dir.all_attempts()
    try:
        pace = msgspec.json.decode(attempts[-1].pace.read_bytes(), type=Pace) if attempts else None
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return pace.describe() if pace else None
