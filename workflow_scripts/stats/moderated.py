"""The variance of a contrast between seeds, moderated by its family: what a few seeds say of it, and what the others may add.

Three seeds give a contrast's seed variance with two degrees of freedom. The mean over the family has more, but is wrong for a
method that varies more than the others: where its sd is twenty times theirs, its 95 % intervals cover 65 to 70 %. Between the two
lies empirical Bayes, as for genes on a few arrays (Smyth 2004, Linear models and empirical Bayes methods for assessing
differential expression in microarray experiments, Stat. Appl. Genet. Mol. Biol. 3(1):3): seed variances s2 come from a scaled
inverse chi-square with d0 degrees of freedom around s02, and a contrast's own d = S - 1 become d0 + d.

A family has 4 to 10 contrasts where limma has thousands, and its contrasts share arms. So four things differ from Smyth, all on
the careful side (simulated in docs/report_simulation.md):

- s02 is the family's arithmetic mean, not the geometric one: a wild method makes the quiet ones careful, not the other way round.
- A variance is never moderated below the contrast's own.
- d0 is at most d, and nothing with two seeds: so few contrasts can't say that their variances are equal, least of all where they
  share one wild reference, whose variance all of them estimate at once.
- d0 is taken times the probability that a contrast which belongs to the family varies at least as much as this one, by an F test
  against the mean of the others, as in Phipson, Lee, Majewski, Alexander & Smyth (2016, Annals of Applied Statistics 10(2),
  946-963) for hypervariable genes: who stands out is judged by its own seeds.
"""

import numpy as np
from scipy import special, stats

from workflow_scripts.stats.components import Parts, Split


def prior_df(seed: np.ndarray, df: int) -> np.ndarray:
    """d0 of variances (..., contrasts) with `df` degrees of freedom each, by the moments of their logarithms: Smyth (2004), 6.2.

    trigamma(d0 / 2) = var(log s2) - trigamma(df / 2). Where they differ no more than chance makes them, d0 is infinite.
    """
    excess = np.log(seed).var(axis=-1, ddof=1) - special.polygamma(1, df / 2)
    varies = excess > 0
    return np.where(varies, 2 * trigamma_inverse(np.where(varies, excess, 1.0)), np.inf)


def trigamma_inverse(x: np.ndarray) -> np.ndarray:
    """y with trigamma(y) = x > 0, by Newton's method on 1 / trigamma, which is convex (Smyth 2004, appendix)."""
    x = np.asarray(x, dtype=float)
    y = 0.5 + 1 / x
    for _ in range(50):
        now = special.polygamma(1, y)
        step = now * (1 - now / x) / special.polygamma(2, y)
        y = y + step
        if np.all(np.abs(step) < 1e-10 * y):
            break
    return y


def moderate(own: Parts, worth: float, trust: float = 1.0) -> Split:
    """The parts of each contrast's variance, with the seed part moderated over the last axis, the family's contrasts.

    worth: how many independent contrasts the family is (`components.effective`). A contrast whose runs do not differ between
    seeds at all (two models without seeds) has no seed part, and none of the family's is given to it. trust: how often its own
    degrees of freedom the family may add; the simulation shows that 1 keeps the promises, and 2 does not.
    """
    df = own.seeds - 1
    varies = own.seed + own.resid > 0
    count = varies.sum(axis=-1, keepdims=True)
    if df < 2 or own.seed.shape[-1] < 2:
        return Split(own.prompt, own.seed, own.resid, np.full(own.seed.shape, float(max(df, 1))), own.prompts, own.seeds)
    total = own.seed.sum(axis=-1, keepdims=True)
    mean = total / np.maximum(count, 1)
    others = (total - own.seed) / np.maximum(count - 1, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        belongs = stats.f.sf(own.seed / others, df, df * max(worth - 1, 1))
    # log(0) tells nothing of the spread: a variance of 0 among others counts as the mean, so as one that does not stand out.
    d0 = prior_df(np.where(own.seed > 0, own.seed, np.where(mean > 0, mean, 1.0)), df)
    weight = np.where((count > 1) & varies & (others > 0), np.minimum(d0[..., None], trust * df) * np.nan_to_num(belongs), 0.0)
    seed = np.maximum(own.seed, (weight * mean + df * own.seed) / (weight + df))
    return Split(own.prompt, np.where(varies, seed, 0.0), own.resid, weight + df, own.prompts, own.seeds)
