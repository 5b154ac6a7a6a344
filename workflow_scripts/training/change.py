"""How far a training moved a value on held-out rows: the mean of the paired differences of its units, with a standard error.

A unit is a part of the held-out rows that gives a number of its own, the same part before and after: a row, a pair, a prompt
(training/units.py).
"""

from collections.abc import Iterable
from math import sqrt
from statistics import fmean, stdev

Units = dict[str, list[float]]  # value -> its number for each unit


def changes(before: Units, after: Units) -> dict[str, dict[str, float | int | None]]:
    """Value -> mean of the units' differences, its standard error (None for a single unit) and how many units there are."""
    found = {}
    for name in before:
        moved = [late - early for early, late in zip(before[name], after[name], strict=True)]
        error = round(stdev(moved) / sqrt(len(moved)), 6) if len(moved) > 1 else None
        found[name] = {"mean": round(fmean(moved), 6), "stderr": error, "n": len(moved)}
    return found


def of_ratio(parts: Iterable[tuple[float, float]]) -> list[float]:
    """Units of sum(a) / sum(b), from (a, b) of each part. Their mean is the ratio.

    Linearised, since parts may weigh unequally: each is the ratio plus what the part adds to it, so that the differences of the
    units spread as the ratio's difference does. With equal b that is a / b.
    """
    parts = list(parts)
    total = sum(b for _, b in parts)
    ratio = sum(a for a, _ in parts) / total
    return [ratio + len(parts) * (a - ratio * b) / total for a, b in parts]
