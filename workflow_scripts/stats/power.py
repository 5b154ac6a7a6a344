"""What a comparison could find: power of a t-test, the minimum detectable effect, and how many prompts or seeds it would need."""

from collections.abc import Callable

import numpy as np
from scipy import optimize, special, stats

from workflow_scripts.stats import components

Own = tuple[float, float, float]  # the parts (prompt, seed, resid) of a contrast's variance

POWER = 0.8
MOST_PROMPTS, MOST_SEEDS = 10**9, 10**6  # beyond these, none suffices
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)
QUANTILES, WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2


def power(effect: float, se: float, df: float, alpha: float) -> float:
    """P(two-sided t-test at level alpha rejects), by the noncentral t (Johnson, Kotz & Balakrishnan 1995, chapter 31).

    Its integral over the chi-square of the variance, P(|Z + effect / se| > t sqrt(W / df)), is taken by Gauss-Legendre over W's
    quantiles, to about 1e-5: scipy's noncentral t returns NaN far out.
    """
    if se == 0:
        return 1.0 if effect else alpha
    return _power(abs(effect) / se, _limits(df, alpha))


def detectable(se: float, df: float, alpha: float, wanted: float = POWER) -> float:
    """The minimum detectable effect: the true difference that a test at level alpha finds with probability `wanted`."""
    limits = _limits(df, alpha)
    top = float(limits.max()) + 10
    return se * float(optimize.brentq(lambda ncp: _power(ncp, limits) - wanted, 0.0, top, xtol=1e-8))


def _limits(df: float, alpha: float) -> np.ndarray:
    """t sqrt(W / df) at the nodes of W's quantiles (chi-square W is twice a gamma)."""
    return -special.stdtrit(df, alpha / 2) * np.sqrt(special.gammaincinv(df / 2, QUANTILES) / (df / 2))


def _power(ncp: float, limits: np.ndarray) -> float:
    return float(WEIGHTS @ (special.ndtr(ncp - limits) + special.ndtr(-ncp - limits)))


def detectable_interval(se: float, df: float, alpha: float, level: float = 0.95) -> tuple[float, float]:
    """The interval of the minimum detectable effect, from the chi-square interval of the variance: df se^2 / chi2 quantiles."""
    middle = detectable(se, df, alpha)
    tail = (1 - level) / 2
    low, high = (float(np.sqrt(df / stats.chi2.ppf(q, df))) for q in (1 - tail, tail))
    return middle * low, middle * high


def prompts_needed(effect: float, own: Own, seeds: int, prompts: int, worth: float, alpha: float) -> int | None:
    """How many prompts at the present seeds find `effect` with 80 % power; None where none suffices.

    The prompt and residual part of the present variance shrink as 1 / n, the variance between seeds stays.
    """
    prompt, seed, resid = own
    stays = max(0.0, seed - resid)

    def enough(number: float) -> bool:
        shrunk = prompts / number
        squares = (prompt * shrunk, stays + resid * shrunk, resid * shrunk)
        return _enough(effect, prompt * shrunk + stays, squares, seeds, number, worth, alpha)

    return _smallest(enough, 2, MOST_PROMPTS) if effect else None


def seeds_needed(effect: float, own: Own, seeds: int, prompts: int, worth: float, alpha: float) -> int | None:
    """How many seeds at the present prompts find `effect` with 80 % power; None where none suffices, or with one seed.

    The seed and residual part shrink as 1 / S, the variance between prompts stays.
    """
    if seeds == 1 or not effect:
        return None
    prompt, seed, resid = own
    stays = max(0.0, prompt - resid)

    def enough(number: float) -> bool:
        shrunk = seeds / number
        squares = (stays + resid * shrunk, max(seed, resid) * shrunk, resid * shrunk)
        total = stays + resid * shrunk + max(0.0, seed - resid) * shrunk
        return _enough(effect, total, squares, number, prompts, worth, alpha)

    return _smallest(enough, 2, MOST_SEEDS)


def _enough(
    effect: float, total: float, squares: tuple[float, ...], seeds: float, prompts: float, worth: float, alpha: float
) -> bool:
    each = components.dfs(seeds, prompts, worth)
    if seeds == 1:
        df = prompts - 1
    else:
        df = float(components.satterthwaite(np.array(total), tuple(map(np.array, squares)), each))
    return power(effect, total**0.5, df, alpha) >= POWER


def _smallest(enough: Callable[[float], bool], low: int, high: int) -> int | None:
    """The smallest whole number from low to high that is enough, by bisection; None if even the largest is not."""
    if enough(low):
        return low
    if not enough(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
