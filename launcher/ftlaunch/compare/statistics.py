"""Means with their spread, and paired differences with confidence intervals, in plain Python."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from msgspec import Struct

T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""97.5 % quantile of Student's t for 1 to 30 degrees of freedom; beyond, Cornish and Fisher's expansion is as good."""
Z_975 = 1.959964


class Spread(Struct, frozen=True):
    """Mean and standard deviation of a measure over seeds."""

    mean: float
    std: float | None
    """None for a single seed."""


class Difference(Struct, frozen=True):
    """Mean of paired differences, with the 95 % confidence interval of Student's t."""

    mean: float
    half_width: float | None
    """None for a single pair."""
    pairs: int
    of: str
    """What is paired: "rows" that were held out, or "seeds"."""


def spread(values: Sequence[float]) -> Spread:
    """Return mean and sample standard deviation; a single value has none."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None)


def paired(ours: Sequence[float], theirs: Sequence[float], of: str) -> Difference:
    """Ours less theirs, pair by pair."""
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    count = len(differences)
    half = t_quantile(count - 1) * stdev(differences) / math.sqrt(count) if count > 1 else None
    return Difference(fmean(differences), half, count, of)


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t, to three decimals."""
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    return Z_975 + (Z_975**3 + Z_975) / (4 * degrees) + (5 * Z_975**5 + 16 * Z_975**3 + 3 * Z_975) / (96 * degrees**2)
