"""How sure a mean over seeds and prompts is: variance parts of a table seeds x prompts, and their degrees of freedom.

The model is two-way without replication, both ways random: d[s, i] = difference + prompt_i + seed_s + residual_si. What is
asked for is the mean over the population of prompts and of seeds, so both count. All functions work on the last axes and
take any axes in front (contrasts, simulated families), so that the simulation runs the same code as the report.
"""

from dataclasses import dataclass

import numpy as np
from scipy import special


@dataclass(frozen=True)
class Parts:
    """Mean squares of tables seeds x prompts, each over n * S: parts of the variance of the mean. Arrays of any shape."""

    mean: np.ndarray
    prompt: np.ndarray  # MS_prompt / (n S) = variance over prompts of the mean over seeds / n
    seed: np.ndarray  # MS_seed / (n S) = variance over seeds of the mean over prompts / S; 0 with one seed
    resid: np.ndarray  # MS_residual / (n S); 0 with one seed
    seeds: int
    prompts: int


@dataclass(frozen=True)
class Split:
    """What a contrast is judged by: the parts of its variance, and how well the one between seeds is known."""

    prompt: np.ndarray
    seed: np.ndarray
    resid: np.ndarray
    df: np.ndarray  # degrees of freedom of the seed part
    prompts: float
    seeds: float

    @property
    def variance(self) -> np.ndarray:
        """Of the mean: prompt + max(0, seed - resid)."""
        return self.prompt + np.maximum(0.0, self.seed - self.resid)


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


def alone(own: Parts, groups: int = 1) -> Split:
    """The contrast's own parts, nothing from others. groups: of S seeds each, from which its seed part comes."""
    return Split(
        own.prompt, own.seed, own.resid, np.full(own.seed.shape, float(max(1, groups * (own.seeds - 1)))), own.prompts, own.seeds
    )


# Quantiles of a chi-square and their weights: Gauss-Legendre over v, with the probability v^3, so that the far small end is seen.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)
QUANTILES, WEIGHTS = ((_NODES + 1) / 2) ** 3, 1.5 * _WEIGHTS * ((_NODES + 1) / 2) ** 2
FEW = 400  # degrees of freedom that are looked up one by one; the simulation has thousands
STEPS = 60


def chi_square(df: np.ndarray) -> np.ndarray:
    """(..., nodes): the chi-square's quantiles over its degrees of freedom, so with mean 1. Interpolated where there are many."""
    half = np.asarray(df, dtype=float) / 2
    if half.size <= FEW:
        return special.gammaincinv(half[..., None], QUANTILES) / half[..., None]
    grid = np.linspace(half.min(), half.max() + 1e-9, FEW)
    known = np.log(special.gammaincinv(grid[:, None], QUANTILES) / grid[:, None])
    return np.exp(np.stack([np.interp(half, grid, column) for column in known.T], axis=-1))


def possible(split: Split) -> np.ndarray:
    """(..., nodes): the variances of the mean that the estimate may stand for: prompt + max(0, seed df / W - resid)."""
    if split.seeds == 1:
        return split.prompt[..., None] * np.ones_like(QUANTILES)
    with np.errstate(over="ignore"):
        between = split.seed[..., None] / chi_square(split.df) - split.resid[..., None]
    return split.prompt[..., None] + np.maximum(0.0, between)


def tail(x: np.ndarray, variances: np.ndarray, prompts: float) -> np.ndarray:
    """P(an estimate whose true value is 0 is at least x), over the possible variances (..., nodes).

    The prompt part is known from hundreds of prompts, the seed part from a few seeds. The variance of their sum is no mean
    square, and Satterthwaite's approximation by one fails where the seeds are one contrast's own: a seed part that is small by
    chance gets a small variance and many degrees of freedom at once. So the uncertain part is integrated over what it may be,
    a generalised p-value (Tsui & Weerahandi 1989, Journal of the American Statistical Association 84, 602-607), which is Fisher's
    solution of the Behrens-Fisher problem: x / sqrt(prompt + max(0, seed df / W - resid)) against Student's t of the prompts,
    mean over W, a chi-square with the seed part's degrees of freedom. Where seeds are all, that is Student's t with their
    degrees of freedom; with one seed it is the paired t-test.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(variances > 0, x[..., None] / np.sqrt(variances), np.sign(x)[..., None] * np.inf)
    return special.stdtr(prompts - 1, -np.nan_to_num(ratio, nan=0.0, posinf=np.inf, neginf=-np.inf)) @ WEIGHTS


def p_value(difference: np.ndarray, split: Split) -> np.ndarray:
    """Two-sided p. Where nothing varies: 1 for no difference, else the sign test over prompts.

    A difference without variance means that all n prompts changed in the same direction: 2 * 0.5^n.
    """
    p = 2 * tail(np.abs(difference), possible(split), split.prompts)
    return np.where(split.variance > 0, np.minimum(p, 1.0), np.where(difference == 0, 1.0, 2.0 * 0.5**split.prompts))


def p_equivalent(difference: np.ndarray, split: Split, margin: float) -> np.ndarray:
    """The larger p of two one-sided tests: difference <= -margin, and difference >= margin (Schuirmann 1987, Journal of
    Pharmacokinetics and Biopharmaceutics 15, 657-680). Small where the difference is surely within the margin."""
    size = np.abs(difference)
    p = tail(margin - size, possible(split), split.prompts)
    return np.where(split.variance > 0, p, np.where((difference == 0) & (margin > 0), 0.5**split.prompts, 1.0))


def half_width(split: Split, alpha: float) -> np.ndarray:
    """Of the 1 - alpha interval: the difference x whose two-sided p is alpha.

    By Newton's method on log p over log x, where the tails of Student's t are nearly lines, kept within halved brackets.
    """
    variances = possible(split)
    most = special.stdtrit(split.prompts - 1, 1 - alpha / 4) * np.sqrt(split.prompt)
    if split.seeds > 1:
        most = most + special.stdtrit(split.df, 1 - alpha / 4) * np.sqrt(split.seed)
    low, high = np.zeros_like(most), 2 * most
    x, df = np.asarray(most, dtype=float), split.prompts - 1
    peak = np.exp(special.gammaln((df + 1) / 2) - special.gammaln(df / 2)) / np.sqrt(np.pi * df)  # of Student's density
    sds = np.sqrt(np.where(variances > 0, variances, 1.0))
    for _ in range(STEPS):
        p = 2 * tail(x, variances, split.prompts)
        low, high = np.where(p > alpha, x, low), np.where(p > alpha, high, x)
        ratio = x[..., None] / sds
        slope = -2 * (ratio * peak * np.exp(-(df + 1) / 2 * np.log1p(ratio**2 / df))) @ WEIGHTS / np.where(p > 0, p, 1.0)
        with np.errstate(all="ignore"):
            newton = x * np.exp(-np.log(p / alpha) / slope)
        found = np.abs(newton - x) <= 1e-9 * x  # also where the last step ends on a bracket, or a hair beyond it
        after = np.where(found | ((newton > low) & (newton < high)), newton, (low + high) / 2)
        if np.all(found | (np.abs(after - x) <= 1e-9 * x)):
            return after
        x = after
    return x


def interval(difference: np.ndarray, split: Split, alpha: float) -> np.ndarray:
    """The 1 - alpha intervals (..., 2).

    Where nothing varies: (0, 0) for no difference; else all n prompts changed in the same direction, and the exact lower bound
    of the share that does (Clopper & Pearson 1934, Biometrika 26) bounds the difference: 2 (alpha / 2)^(1/n) - 1 to 1.
    """
    half = half_width(split, alpha)
    low, high = difference - half, difference + half
    still = (split.variance == 0) & (difference != 0)
    bound = 2 * (alpha / 2) ** (1 / split.prompts) - 1
    size, sign = np.abs(difference), np.sign(difference)
    near, far = sign * np.minimum(size, bound), sign
    low, high = np.where(still, np.minimum(near, far), low), np.where(still, np.maximum(near, far), high)
    return np.stack([low, high], axis=-1)
