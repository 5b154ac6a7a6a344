"""A declared family of comparisons between training methods: differences, intervals over prompts and seeds, verdicts.

    family = compare({"dpo": verdicts, "sft_v2": verdicts, ...}, [("dpo", "sft_v2"), ...])

Verdicts are 0 or 1 for each prompt; a run is one arm (method) with one seed. Differences, errors and intervals are fractions
(0.03 is 3 points) unless a name ends in _points.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from workflow_scripts.stats import components, power
from workflow_scripts.stats.components import Parts

BETTER, WORSE, CANNOT_TELL = "better", "worse", "cannot tell"


@dataclass(frozen=True)
class McNemar:
    """One seed's paired verdicts: how many prompts only one of the two arms got right, and the exact test of their balance."""

    only_after: int
    only_before: int
    p: float  # two-sided binomial (McNemar 1947, Psychometrika 12, 153-157); it covers these two runs, not other seeds


@dataclass(frozen=True)
class Comparison:
    """One contrast: `after` minus `before`."""

    after: str
    before: str
    mean_after: float
    mean_before: float
    difference: float
    se: float  # over prompts and seeds, the seed variance pooled over the family
    df: float
    t: float
    p: float  # two-sided
    p_holm: float  # Holm (1979), adjusted for the family; the verdict follows it
    low: float  # 1 - alpha interval of this difference alone
    high: float
    low_simultaneous: float  # Bonferroni: all intervals of the family cover at once with probability 1 - alpha
    high_simultaneous: float
    se_unpooled: float  # with this contrast's own seed variance
    df_unpooled: float
    low_unpooled: float
    high_unpooled: float
    verdict: str  # better | worse | cannot tell
    prompts_needed: int | None  # at the present seeds, for 80 % power at Holm's first step; None: none suffices
    seeds_needed: int | None  # at the present prompts, likewise; None with one seed, too
    words: str
    mcnemar: tuple[McNemar, ...]  # one for each seed; descriptive


@dataclass(frozen=True)
class Homogeneity:
    """Whether one arm varies more between seeds than the others: see `homogeneity`."""

    arm: str  # the arm that varies most
    share: float  # of the sum of the arms' seed variances, the family's seed effects taken out; 1 / arms is expected
    p: float
    seed_sd_points: dict[str, float]  # arm -> standard deviation of its seeds' means, in points


@dataclass(frozen=True)
class Family:
    comparisons: tuple[Comparison, ...]
    alpha: float
    seeds: int
    prompts: int
    seeds_covered: bool  # False with one seed: errors then cover the choice of prompts only
    prompt_sd_points: float  # of a difference between prompts, beyond the residual
    seed_sd_points: float | None  # of a difference between seeds; None with one seed, as the next two
    resid_sd_points: float | None  # of a single prompt and seed; with one seed it is in prompt_sd_points
    seed_df: float | None  # of the pooled seed variance
    mde: float  # true difference found with 80 % power at Holm's first step, for a contrast of average variance
    mde_low: float  # its 95 % interval, from the chi-square interval of the variance
    mde_high: float
    homogeneity: Homogeneity | None  # None with one seed, below three arms, or where no arm varies

    def table(self) -> pandas.DataFrame:
        """One row for each comparison, the fields of `Comparison` without McNemar's."""
        rows = [asdict(comparison) for comparison in self.comparisons]
        whole = {"prompts_needed": "Int64", "seeds_needed": "Int64"}  # with a missing value, not NaN among floats
        return pandas.DataFrame(rows).drop(columns="mcnemar").astype(whole)


def compare(arms: dict[str, np.ndarray], contrasts: Sequence[tuple[str, str]], alpha: float = 0.05) -> Family:
    """Compare arms within one declared family.

    arms: name -> (seeds S, prompts n) of 0 and 1. The same prompts in the same order, and seed s of every arm descends from the
    parent's run of seed s, so that differences are taken run by run: d[s, i] = after[s, i] - before[s, i].
    contrasts: (after, before). alpha: the family-wise error rate of the verdicts, and 1 - alpha the coverage of intervals.

    The variance of a difference has crossed random effects, prompts and seeds (`components.parts`). Three seeds say next to
    nothing about the seed variance of one contrast (2 degrees of freedom), so that part is pooled over the family
    (`components.variance`); it supposes that contrasts have about the same seed variance, see `homogeneity` and the unpooled
    interval. Verdicts are Holm's (1979, Scandinavian Journal of Statistics 6, 65-70). Raises ValueError, in words.
    """
    tables = _checked(arms, contrasts, alpha)
    seeds, prompts = next(iter(tables.values())).shape
    differences = np.stack([tables[after] - tables[before] for after, before in contrasts])
    own = components.parts(differences)
    worth = components.effective(contrast_matrix(contrasts))
    pooled_seed, pooled_resid = own.seed.mean(), own.resid.mean()
    variance, df = components.variance(own, pooled_seed, pooled_resid, worth)
    variance_unpooled, df_unpooled = components.variance(own, own.seed, own.resid, 1.0)
    p = components.p_value(own.mean, variance, df, prompts)
    p_holm = holm(p)
    first_step = alpha / len(contrasts)
    alone = components.interval(own.mean, variance, df, alpha, prompts)
    together = components.interval(own.mean, variance, df, first_step, prompts)
    unpooled = components.interval(own.mean, variance_unpooled, df_unpooled, alpha, prompts)

    comparisons = []
    for k, (after, before) in enumerate(contrasts):
        difference, se = float(own.mean[k]), float(np.sqrt(variance[k]))
        verdict = CANNOT_TELL if p_holm[k] > alpha else BETTER if difference > 0 else WORSE
        split = (float(own.prompt[k]), float(pooled_seed), float(pooled_resid))
        more_prompts = power.prompts_needed(difference, split, seeds, prompts, worth, first_step)
        more_seeds = power.seeds_needed(difference, split, seeds, prompts, worth, first_step)
        identical = not differences[k].any()
        comparisons.append(
            Comparison(
                after=after,
                before=before,
                mean_after=float(tables[after].mean()),
                mean_before=float(tables[before].mean()),
                difference=difference,
                se=se,
                df=float(df[k]),
                t=difference / se if se else float(np.sign(difference)) * np.inf if difference else 0.0,
                p=float(p[k]),
                p_holm=float(p_holm[k]),
                low=float(alone[k, 0]),
                high=float(alone[k, 1]),
                low_simultaneous=float(together[k, 0]),
                high_simultaneous=float(together[k, 1]),
                se_unpooled=float(np.sqrt(variance_unpooled[k])),
                df_unpooled=float(df_unpooled[k]),
                low_unpooled=float(unpooled[k, 0]),
                high_unpooled=float(unpooled[k, 1]),
                verdict=verdict,
                prompts_needed=more_prompts,
                seeds_needed=more_seeds,
                words=_words(verdict, difference, alone[k], more_prompts, more_seeds, seeds, alpha, identical),
                mcnemar=tuple(
                    _mcnemar(after_run, before_run) for after_run, before_run in zip(tables[after], tables[before], strict=True)
                ),
            )
        )
    return Family(tuple(comparisons), alpha, seeds, prompts, seeds > 1, **_summary(own, worth, first_step, tables))


def contrast_matrix(contrasts: Sequence[tuple[str, str]]) -> np.ndarray:
    """L (contrasts x arms that occur): 1 for after, -1 for before."""
    names = list(dict.fromkeys(name for pair in contrasts for name in pair))
    matrix = np.zeros((len(contrasts), len(names)))
    for row, (after, before) in zip(matrix, contrasts, strict=True):
        row[names.index(after)], row[names.index(before)] = 1.0, -1.0
    return matrix


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's adjusted p: the k-th smallest of K times K - k + 1, at least its predecessor and at most 1.

    As statsmodels' `multipletests(p, method="holm")`, which collects garbage each time (0.2 s in a large process).
    """
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def homogeneity(arms: dict[str, np.ndarray]) -> Homogeneity | None:
    """Does one arm vary more between seeds than the rest? None with one seed, below three arms, or where nothing varies.

    Arms of one seed share their parent's run, so their means over prompts x[a, s] are correlated. That shared effect cancels in
    every contrast; here it is taken out, with anything else that all arms of a seed share, as in Russell & Bradley (1958,
    One-way variances in a two-way classification, Biometrika 45, 111-129): r[a, s] = x[a, s] - x[., s] - x[a, .] + x[., .].
    The statistic is Cochran's (1941, Annals of Eugenics 11, 47-52), the largest share in the sum of squares: if arms have equal
    variances and are normal, the residuals are isotropic in (A - 1)(S - 1) dimensions, so

        sum_s r[a, s]^2 / sum r^2  is  (1 - 1/A) * Beta((S - 1) / 2, (A - 2)(S - 1) / 2)

    and p is the smallest tail times A (Bonferroni; 't Lam 2010, Analytica Chimica Acta 659, 68-84, for independent arms).
    An arm that is the others' parent has no effect of its own and counts as uneven, rightly (docs/report_simulation.md).
    It keeps its level with three seeds, unlike Levene's or Brown and Forsythe's test, and a variance of 0 does no harm,
    unlike in Bartlett's. With three seeds it finds only gross differences: a large p is no proof of equal variances.
    """
    means = np.stack([runs.mean(axis=1) for runs in arms.values()])
    count, seeds = means.shape
    if seeds == 1 or count < 3:
        return None
    residuals = means - means.mean(axis=0) - means.mean(axis=1, keepdims=True) + means.mean()
    squares = np.square(residuals).sum(axis=1)
    if squares.sum() < 1e-20:  # of fractions: rounding only
        return None
    shares = squares / squares.sum()
    largest = int(shares.argmax())
    tail = stats.beta.sf(shares[largest] / (1 - 1 / count), (seeds - 1) / 2, (count - 2) * (seeds - 1) / 2)
    sds = dict(zip(arms, map(float, 100 * means.std(axis=1, ddof=1)), strict=True))
    return Homogeneity(list(arms)[largest], float(shares[largest]), float(min(1.0, count * tail)), sds)


def _checked(arms: dict[str, np.ndarray], contrasts: Sequence[tuple[str, str]], alpha: float) -> dict[str, np.ndarray]:
    """The arms that occur in contrasts, as floats; ValueError if something is not as `compare` says."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}; expected a number between 0 and 1, such as 0.05")
    if not contrasts:
        raise ValueError("the family has no contrasts; declare at least one pair (after, before)")
    seen: set[frozenset[str]] = set()
    tables: dict[str, np.ndarray] = {}
    for after, before in contrasts:
        if after == before:
            raise ValueError(f"the contrast ({after}, {before}) compares an arm with itself")
        if frozenset((after, before)) in seen:
            raise ValueError(f"the contrast of {after} and {before} is declared twice; keep one, in one direction")
        seen.add(frozenset((after, before)))
        for name in (after, before):
            if name not in arms:
                raise ValueError(
                    f"the contrast ({after}, {before}) names {name!r}, which is not among the arms {', '.join(arms)}"
                )
            tables[name] = _verdicts(name, arms[name])
    first = next(iter(tables))
    for name, table in tables.items():
        if table.shape != tables[first].shape:
            raise ValueError(f"arm {name!r} has {_size(table)}, arm {first!r} has {_size(tables[first])}; all need the same")
    return tables


def _verdicts(name: str, values: np.ndarray) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 2:
        raise ValueError(f"arm {name!r} has an array of {array.ndim} dimensions; expected 2, seeds x prompts")
    if array.shape[0] < 1 or array.shape[1] < 2:
        raise ValueError(f"arm {name!r} has {_size(array)}; expected at least 1 seed and 2 prompts")
    if array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        raise ValueError(f"arm {name!r} has values other than 0 and 1; a verdict is 0 (failed) or 1 (followed)")
    return array.astype(float)


def _size(array: np.ndarray) -> str:
    return f"{array.shape[0]} seeds x {array.shape[1]} prompts"


def _mcnemar(after: np.ndarray, before: np.ndarray) -> McNemar:
    gained, lost = int(np.sum(after > before)), int(np.sum(after < before))
    p = mcnemar([[0, gained], [lost, 0]], exact=True).pvalue if gained + lost else 1.0
    return McNemar(gained, lost, float(p))


def _summary(own: Parts, worth: float, alpha: float, tables: dict[str, np.ndarray]) -> dict:
    """The fields of `Family` on the family as a whole, from the parts averaged over its contrasts."""
    average = Parts(own.mean.mean(), own.prompt.mean(), own.seed.mean(), own.resid.mean(), own.seeds, own.prompts)
    variance, df = components.variance(average, average.seed, average.resid, worth)
    se = float(np.sqrt(variance))
    low, high = power.detectable_interval(se, float(df), alpha)
    several = own.seeds > 1

    def points(part: np.ndarray, times: int) -> float:
        return 100 * float(np.sqrt(max(0.0, float(part)) * times))

    return {
        "prompt_sd_points": points(average.prompt - average.resid, own.prompts),
        "seed_sd_points": points(average.seed - average.resid, own.seeds) if several else None,
        "resid_sd_points": points(average.resid, own.seeds * own.prompts) if several else None,
        "seed_df": worth * (own.seeds - 1) if several else None,
        "mde": power.detectable(se, float(df), alpha),
        "mde_low": low,
        "mde_high": high,
        "homogeneity": homogeneity(tables),
    }


def _words(
    verdict: str,
    difference: float,
    interval: np.ndarray,
    prompts: int | None,
    seeds_needed: int | None,
    seeds: int,
    alpha: float,
    identical: bool,
) -> str:
    """The comparison in one sentence."""
    one_seed = "; one seed, so what another seed would give is unknown" if seeds == 1 else ""
    if verdict != CANNOT_TELL:
        low, high = sorted(100 * np.sign(difference) * interval)
        size, level = 100 * abs(difference), 100 * (1 - alpha)
        return f"{verdict} by {size:.1f} points ({level:g} % interval {low:.1f} to {high:.1f}){one_seed}"
    if identical:
        return f"{CANNOT_TELL}: both arms have the same verdicts{one_seed}"
    if difference == 0:
        return f"{CANNOT_TELL}: no difference was seen{one_seed}"
    ways = [f"about {_rounded(prompts)} prompts"] if prompts else []
    ways += [f"{_rounded(seeds_needed)} seeds"] if seeds_needed else []
    if not ways:
        return f"{CANNOT_TELL}: neither more prompts alone nor more seeds alone would be enough{one_seed}"
    return f"{CANNOT_TELL}: would need {' or '.join(ways)}{one_seed}"


def _rounded(number: int) -> str:
    """Two significant digits, rounded up: 2,100."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return f"{-(-number // unit) * unit:,}"
