"""How long each rank of a stage works at a step by itself, and which of them keep the others waiting."""

from statistics import median_low

from msgspec import Struct

from ftlaunch.run.files import read_if_sound
from ftlaunch.run.layout import StageDir

SLOW = 1.5
"""Times as long as the median rank works one that is named."""
SHARE = 0.1
"""Share of a step that it costs the others at least."""
NAMED = 3
"""Ranks that keep others waiting and are named, at most."""
LISTED = 8
"""Ranks that are listed one by one, at most."""


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

    def by_rank(self) -> str | None:
        """One line about all ranks: how long each works at a step; None of a single rank."""
        if len(self.seconds) < 2:
            return None
        if len(self.seconds) > LISTED:
            return f"{len(self.seconds)} ranks work {min(self.seconds):.2f} to {max(self.seconds):.2f} s at a step"
        several = len(set(self.hosts)) > 1
        ranks = enumerate(zip(self.seconds, self.hosts, strict=True))
        told = [f"{own:.2f} s by rank {rank}" + (f" on {host}" if several else "") for rank, (own, host) in ranks]
        return f"work at a step: {', '.join(told)}"


def read_pace(stage_dir: StageDir) -> Pace | None:
    """Return the pace of the newest attempt; None where it has not told any."""
    attempts = stage_dir.all_attempts()
    return read_if_sound(attempts[-1].pace, Pace) if attempts else None
