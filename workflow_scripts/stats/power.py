"""What a comparison could find: its power, the minimum detectable effect, and how many prompts or seeds it would need."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy import optimize, special, stats

from workflow_scripts.stats import components
from workflow_scripts.stats.components import Split

POWER = 0.8
MOST_PROMPTS, MOST_SEEDS = 10**9, 10**6  # beyond these, none suffices
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
QUANTILES, WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2


def limits(split: Split, alpha: float) -> np.ndarray:
    """The smallest difference that a test at level alpha finds, at the quantiles of the seed part's chi-square.

    split: the true parts of one contrast. The test sees the seed part as seed W / df; the prompt and residual parts have hundreds
    of degrees of freedom and count as known.
    """
    drawn = special.gammaincinv(split.df / 2, QUANTILES) / (split.df / 2)
    seen = replace(split, prompt=split.prompt + 0 * drawn, seed=split.seed * drawn, resid=split.resid + 0 * drawn)
    return components.half_width(seen, alpha)


def power(effect: float, split: Split, alpha: float) -> float:
    """P(two-sided test at level alpha finds a true difference of `effect`): a mean over what seed variance it may see."""
    se = float(np.sqrt(split.variance))
    if se == 0:
        return 1.0 if effect else alpha
    return _power(effect / se, limits(split, alpha) / se)


def detectable(split: Split, alpha: float, wanted: float = POWER) -> float:
    """The minimum detectable effect: the true difference that a test at level alpha finds with probability `wanted`."""
    se = float(np.sqrt(split.variance))
    if se == 0:
        return 0.0
    ratios = limits(split, alpha) / se
    return se * float(optimize.brentq(lambda ncp: _power(ncp, ratios) - wanted, 0.0, float(ratios.max()) + 10, xtol=1e-8))


def _power(ncp: float, ratios: np.ndarray) -> float:
    return float(WEIGHTS @ (special.ndtr(ncp - ratios) + special.ndtr(-ncp - ratios)))


def detectable_interval(split: Split, alpha: float, level: float = 0.95) -> tuple[float, float]:
    """The interval of the minimum detectable effect: at both ends of the chi-square interval of the seed part."""
    tail = (1 - level) / 2
    low, high = (np.maximum(split.resid, split.seed * split.df / stats.chi2.ppf(q, split.df)) for q in (1 - tail, tail))
    return detectable(replace(split, seed=low), alpha), detectable(replace(split, seed=high), alpha)


def prompts_needed(effect: float, split: Split, alpha: float) -> int | None:
    """How many prompts at the present seeds find `effect` with 80 % power; None where none suffices.

    The prompt and residual part of the present variance shrink as 1 / n, the variance between seeds stays.
    """
    stays = np.maximum(0.0, split.seed - split.resid)

    def at(number: float) -> float:
        part = split.prompts / number
        resid = split.resid * part
        return power(effect, replace(split, prompt=split.prompt * part, seed=stays + resid, resid=resid, prompts=number), alpha)

    return _smallest(at, MOST_PROMPTS) if effect else None


def seeds_needed(effect: float, split: Split, alpha: float) -> int | None:
    """How many seeds at the present prompts find `effect` with 80 % power; None where none suffices.

    The seed and residual part shrink as 1 / S, the variance between prompts stays, degrees of freedom grow with the seeds.
    """
    stays = np.maximum(0.0, split.prompt - split.resid)

    def at(number: float) -> float:
        part, df = split.seeds / number, split.df * (number - 1) / (split.seeds - 1)
        resid, seed = split.resid * part, np.maximum(split.seed, split.resid) * part
        return power(effect, Split(stays + resid, seed, resid, df, split.prompts, number), alpha)

    return _smallest(at, MOST_SEEDS) if effect else None


def _smallest(at: Callable[[float], float], most: int) -> int | None:
    """The smallest whole number from 2 to `most` whose power is enough; None if even the largest's is not."""
    if at(2) >= POWER:
        return 2
    if at(most) < POWER:
        return None
    return int(np.ceil(np.exp(optimize.brentq(lambda log: at(np.exp(log)) - POWER, np.log(2), np.log(most), xtol=1e-9))))
