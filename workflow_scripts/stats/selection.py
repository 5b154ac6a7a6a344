"""The choice among trials: the best score, with its error, and whether its lead can be told from chance.

Scores are from data that nothing else is judged by, and the best of several is too high by what luck gave it: they choose, and
are quoted as what chose, never as how good a method is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from workflow_scripts.evaluation.scores import mean_stderr

ALPHA = 0.05  # of the whole choice


@dataclass(frozen=True)
class Score:
    """Of one trial. Higher is better."""

    mean: float
    stderr: float | None  # None where there is one unit
    n: int  # units: prompts, or rows or pairs of an objective


@dataclass(frozen=True)
class Lead:
    """By how much the best is ahead of the second. `interval` holds for all pairs of trials at once, whichever came first."""

    second: int
    difference: float
    stderr: float | None
    interval: tuple[float, float] | None
    told: bool  # whether the interval leaves 0 out
    paired: bool


def value(row: dict) -> float:
    """What an entry of `per_prompt` counts: 1 where the answer passes, all its instructions strictly (IFEval) or `correct`
    (everything else), 0 where not; of several answers the share that does, and of a metric that is a number, that."""
    if "value" in row:
        return float(row["value"])
    found = row.get("follow_instruction_list_strict", row.get("correct"))
    return float(all(found) if isinstance(found, list) else bool(found))


def of_prompts(runs: Sequence[Sequence[float]]) -> Score:
    """Mean over a trial's runs of each prompt's value; its error over prompts, a prompt's runs being one cluster."""
    mean, stderr = mean_stderr(list(zip(*runs, strict=True)))
    return Score(mean, stderr, len(runs[0]))


def of_changes(changes: Sequence[dict]) -> Score:
    """Mean over a trial's runs of how far each one's objective moved: mean, stderr and n, as training/change.py has them.

    All trials start from one model and have the same held-out rows, so that the best change is the best objective.
    """
    errors = [change["stderr"] for change in changes]
    stderr = None if None in errors else math.sqrt(math.fsum(error**2 for error in errors)) / len(errors)
    return Score(math.fsum(change["mean"] for change in changes) / len(changes), stderr, min(change["n"] for change in changes))


def best(scores: Sequence[Score]) -> list[int]:
    """The trials from the best to the worst; of equal ones the first comes first."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i].mean, i))


def lead(scores: Sequence[Score], runs: Sequence[Sequence[Sequence[float]]] | None) -> Lead:
    """The lead of the best trial over the second. runs: trial -> run -> verdicts, prompts in one order: paired by prompt.

    Without runs the error is that of two independent scores. Trials are judged on the same rows, so it is rather too large.
    The first two were picked for being so: the interval is Bonferroni's for all pairs.
    """
    first, second = best(scores)[:2]
    difference = scores[first].mean - scores[second].mean
    if runs is not None:
        pairs = [zip(one, other, strict=True) for one, other in zip(runs[first], runs[second], strict=True)]
        stderr = of_prompts([[a - b for a, b in pair] for pair in pairs]).stderr
    else:
        errors = scores[first].stderr, scores[second].stderr
        stderr = None if None in errors else math.hypot(*(error or 0.0 for error in errors))
    interval = None
    if stderr is not None:
        each = ALPHA / math.comb(len(scores), 2)
        reach = float(stats.t.isf(each / 2, max(1, scores[first].n - 1))) * stderr
        interval = (difference - reach, difference + reach)
    return Lead(second, difference, stderr, interval, interval is not None and interval[0] > 0, runs is not None)
