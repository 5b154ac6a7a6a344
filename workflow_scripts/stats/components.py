"""How sure a mean over seeds and prompts is: variance parts of a table seeds x prompts, and their degrees of freedom.

The model is two-way without replication, both ways random: d[s, i] = difference + prompt_i + seed_s + residual_si. What is
asked for is the mean over the population of prompts and of seeds, so both count. All functions work on the last axes and
take any axes in front (contrasts, simulated families), so that the simulation runs the same code as the report.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Parts:
    """Mean squares of tables seeds x prompts, each over n * S: parts of the variance of the mean. Arrays of any shape."""

    mean: np.ndarray
    prompt: np.ndarray  # MS_prompt / (n S) = variance over prompts of the mean over seeds / n
    seed: np.ndarray  # MS_seed / (n S) = variance over seeds of the mean over prompts / S; 0 with one seed
    resid: np.ndarray  # MS_residual / (n S); 0 with one seed
    seeds: int
    prompts: int


def parts(table: np.ndarray) -> Parts:
    """The parts of each table (..., S, n). The method of moments for crossed random effects (Searle, Casella & McCulloch 1992,
    Variance Components, section 4.5; for evaluations Owen 2007, Annals of Applied Statistics 1(2), 386-411):

        E[prompt] = sigma2_prompt / n + sigma2_resid / (n S)
        E[seed]   = sigma2_seed / S   + sigma2_resid / (n S)
        E[resid]  = sigma2_resid / (n S)

    so prompt + seed - resid is unbiased for the variance of the mean, and with one seed prompt alone is the variance over
    prompts.
    """
    seeds, prompts = table.shape[-2:]
    mean = table.mean(axis=(-2, -1))
    by_prompt = table.mean(axis=-2)
    prompt = by_prompt.var(axis=-1, ddof=1) / prompts
    if seeds == 1:
        return Parts(mean, prompt, np.zeros_like(prompt), np.zeros_like(prompt), seeds, prompts)
    by_seed = table.mean(axis=-1)
    seed = by_seed.var(axis=-1, ddof=1) / seeds
    residuals = table - by_seed[..., :, None]
    residuals -= (by_prompt - mean[..., None])[..., None, :]
    resid = np.einsum("...si,...si->...", residuals, residuals) / ((seeds - 1) * (prompts - 1) * seeds * prompts)
    return Parts(mean, prompt, seed, resid, seeds, prompts)


def effective(contrasts: np.ndarray) -> float:
    """How many independent contrasts a pooled variance is worth: tr(LL')^2 / tr((LL')^2), L (contrasts x arms).

    The Satterthwaite (1946, Biometrics Bulletin 2, 110-114) and Box (1954, Annals of Mathematical Statistics 25, 290-302)
    degrees of freedom of a mean of correlated variances, over those of one, for independent arms of equal variance. All pairs
    of A arms: A - 1. M arms against one reference: 4M / (M + 3), which is on the careful side where the reference is the
    arms' own parent run, since its seed effect then cancels (M would do).
    """
    gram = contrasts @ contrasts.T
    return float(np.trace(gram) ** 2 / np.sum(gram**2))


def variance(own: Parts, seed: np.ndarray, resid: np.ndarray, worth: float) -> tuple[np.ndarray, np.ndarray]:
    """(variance of the mean, its degrees of freedom) from the contrast's own prompt part and the seed and residual parts given.

    seed, resid: pooled over `worth` independent contrasts, or the contrast's own (worth 1). The variance is
    prompt + max(0, seed - resid). Its degrees of freedom are Satterthwaite's (1946) for the sum of independent mean squares:

        df = variance^2 / (prompt^2 / (n - 1) + seed^2 / (worth (S - 1)) + resid^2 / (worth (n - 1)(S - 1)))

    also where the seed part is cut off at 0: that the cut hides the part does not make it known. (Simulated in
    docs/report_simulation.md: the df of prompt + max(0, seed - resid) as two parts is too liberal.) One seed: n - 1.
    """
    total = own.prompt + np.maximum(0.0, seed - resid)
    if own.seeds == 1:
        return total, np.full_like(total, own.prompts - 1)
    return total, satterthwaite(total, (own.prompt, seed, resid), dfs(own.seeds, own.prompts, worth))


def dfs(seeds: float, prompts: float, worth: float) -> tuple[float, float, float]:
    """Degrees of freedom of the prompt, seed and residual part."""
    return prompts - 1, worth * (seeds - 1), worth * (seeds - 1) * (prompts - 1)


def satterthwaite(total: np.ndarray, squares: tuple[np.ndarray, ...], each: tuple[float, ...]) -> np.ndarray:
    """Satterthwaite's degrees of freedom, between the fewest of a part and the prompts'; where nothing varies, the prompts'."""
    noise = sum(np.square(part) / df for part, df in zip(squares, each, strict=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.square(total) / noise
    return np.where(noise > 0, np.clip(found, min(each), each[0]), each[0])


def p_value(difference: np.ndarray, variance: np.ndarray, df: np.ndarray, prompts: int) -> np.ndarray:
    """Two-sided p of Student's t. Where nothing varies there is no t: 1 for no difference, else the sign test over prompts.

    A difference without variance means that all n prompts changed in the same direction: 2 * 0.5^n.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        p = 2 * stats.t.sf(np.abs(difference) / np.sqrt(variance), df)
    return np.where(variance > 0, p, np.where(difference == 0, 1.0, 2.0 * 0.5**prompts))


def interval(difference: np.ndarray, variance: np.ndarray, df: np.ndarray, alpha: float, prompts: int) -> np.ndarray:
    """The 1 - alpha intervals (..., 2) of Student's t.

    Where nothing varies: (0, 0) for no difference; else all n prompts changed in the same direction, and the exact lower bound
    of the share that does (Clopper & Pearson 1934, Biometrika 26) bounds the difference: 2 (alpha / 2)^(1/n) - 1 to 1.
    """
    low, high = student(difference, variance, df, alpha)
    still = (variance == 0) & (difference != 0)
    bound = 2 * (alpha / 2) ** (1 / prompts) - 1
    size, sign = np.abs(difference), np.sign(difference)
    near, far = sign * np.minimum(size, bound), sign
    low, high = np.where(still, np.minimum(near, far), low), np.where(still, np.maximum(near, far), high)
    return np.stack([low, high], axis=-1)


def student(mean: np.ndarray, variance: np.ndarray, df: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of Student's 1 - alpha interval."""
    half = stats.t.isf(alpha / 2, df) * np.sqrt(variance)
    return mean - half, mean + half
