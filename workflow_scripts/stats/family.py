"""A declared family of comparisons between training methods: differences, intervals over prompts and seeds, verdicts.

    family = compare({"dpo": verdicts, "sft_v2": verdicts, ...}, [("dpo", "sft_v2"), ...])

Verdicts are 0 or 1 for each prompt, or the share of its answers that pass; a run is one arm (method) with one seed. Differences,
errors and intervals are fractions (0.03 is 3 points) unless a name ends in _points.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from workflow_scripts.stats import components, power
from workflow_scripts.stats.components import Parts, Split
from workflow_scripts.stats.moderated import moderate

BETTER, WORSE, EQUIVALENT, CANNOT_TELL = "better", "worse", "equivalent", "cannot tell"
NO_VERDICT = "no verdict"  # one seed: what another would give is unknown


@dataclass(frozen=True)
class McNemar:
    """One seed's paired verdicts: how many prompts only one of the two arms got right, and the exact test of their balance.

    Of shares: on how many prompts one arm's is the larger; then it is the sign test."""

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
    se: float  # over prompts and, with several, seeds
    seed_df: float | None  # degrees of freedom of its seed part: its own S - 1 and what the family adds; None with one seed
    p: float | None  # two-sided, of this difference alone; None with one seed, as the next two
    p_family: float | None  # Bonferroni: adjusted for the family; better and worse follow it
    p_equivalent: float | None  # of two one-sided tests, adjusted alike; None without a margin
    low: float  # 1 - alpha interval of this difference alone
    high: float
    low_simultaneous: float  # Bonferroni: all intervals of the family cover at once with probability 1 - alpha
    high_simultaneous: float
    low_unpooled: float  # with this contrast's own seed variance, nothing from the family's
    high_unpooled: float
    verdict: str  # better | worse | equivalent | cannot tell; with one seed: no verdict
    prompts_needed: int | None  # at the present seeds, for 80 % power within the family; None: none suffices, or one seed
    seeds_needed: int | None  # at the present prompts, likewise
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
    seed_df: float | None  # of the seed variance of a contrast, mean over the family
    margin: float | None  # differences below it do not matter, as declared; None: not declared
    mde: (
        float | None
    )  # true difference found with 80 % power within the family, for a contrast of average variance; one seed: None
    mde_low: float | None  # its 95 % interval, from the chi-square interval of the seed variance
    mde_high: float | None
    homogeneity: Homogeneity | None  # None with one seed, below three arms, or where no arm varies

    def table(self) -> pandas.DataFrame:
        """One row for each comparison, the fields of `Comparison` without McNemar's."""
        rows = [asdict(comparison) for comparison in self.comparisons]
        whole = {"prompts_needed": "Int64", "seeds_needed": "Int64"}  # with a missing value, not NaN among floats
        return pandas.DataFrame(rows).drop(columns="mcnemar").astype(whole)


def compare(
    arms: dict[str, np.ndarray], contrasts: Sequence[tuple[str, str]], alpha: float = 0.05, margin: float | None = None
) -> Family:
    """Compare arms within one declared family.

    arms: name -> (seeds S, prompts n) of 0 and 1, shares, or groups' values (stats/clusters.py). Prompts are in one order, and
    seed s of every arm descends from the parent's run of seed s: differences are by run, d[s, i] = after[s, i] - before[s, i].
    contrasts: (after, before). alpha: the family-wise error rate of the verdicts, and 1 - alpha the coverage of intervals.
    margin: a difference below it does not matter; with it there is a third verdict, equivalent.

    The variance of a difference has crossed random effects, prompts and seeds (`components.parts`), the seed part moderated by
    the family (`moderated.moderate`); intervals and p are those of `components.tail`. *Better* and *worse* follow the
    simultaneous interval: it leaves 0 out just where Bonferroni's p is at most alpha, so what is quoted is what was judged, the
    direction too. *Equivalent* follows two one-sided tests at alpha over the number of contrasts, and goes before *better*. It
    takes nothing from the level: where the difference is 0 only better and worse are wrong, where it is beyond the margin only
    equivalent is. Raises ValueError, in words.
    """
    tables = _checked(arms, contrasts, alpha)
    if margin is not None and not 0 < margin < 1:
        raise ValueError(f"margin is {margin}; expected a fraction between 0 and 1, such as 0.02")
    differences = np.stack([tables[after] - tables[before] for after, before in contrasts])
    own = components.parts(differences)
    split = moderate(own, components.effective(contrast_matrix(contrasts)))
    comparisons = _compared(tables, contrasts, own, split, components.alone(own), alpha, margin)
    return Family(comparisons, alpha, own.seeds, own.prompts, own.seeds > 1, **_summary(own, split, alpha, margin, tables))


def again(after: np.ndarray, before: np.ndarray, names: tuple[str, str], alpha: float) -> Comparison:
    """One arm against the same arm under other seeds: a comparison of its own, for the null control.

    No seed of one belongs to a seed of the other, so each arm has its own variance between seeds, and they are of one kind:
    their sum has 2 (S - 1) degrees of freedom. The family is not asked: methods may vary less than what they start from.
    """
    tables = _checked(dict(zip(names, (after, before), strict=True)), [names], alpha)
    first, second = (components.parts(tables[name][None]) for name in names)
    own = components.parts((tables[names[0]] - tables[names[1]])[None])
    own = replace(own, seed=first.seed + second.seed, resid=first.resid + second.resid)
    split = components.alone(own, groups=2)
    return _compared(tables, [names], own, split, split, alpha, None, plan=False)[0]


def _compared(
    tables: dict[str, np.ndarray],
    contrasts: Sequence[tuple[str, str]],
    own: Parts,
    split: Split,
    unpooled: Split,
    alpha: float,
    margin: float | None,
    plan: bool = True,
) -> tuple[Comparison, ...]:
    """plan: say how many prompts or seeds would be enough, which takes a moment."""
    several, each = own.seeds > 1, alpha / len(contrasts)
    p = components.p_value(own.mean, split)
    same = components.p_equivalent(own.mean, split, margin) if margin is not None and several else None
    alone, together, by_itself = (
        components.interval(own.mean, *given) for given in ((split, alpha), (split, each), (unpooled, alpha))
    )
    comparisons = []
    for k, (after, before) in enumerate(contrasts):
        difference = float(own.mean[k])
        verdict = NO_VERDICT
        if several:
            verdict = CANNOT_TELL if p[k] > each else BETTER if difference > 0 else WORSE
        if same is not None and same[k] <= each:
            verdict = EQUIVALENT
        one = Split(split.prompt[k], split.seed[k], split.resid[k], split.df[k], split.prompts, split.seeds)
        open_ = plan and several and verdict == CANNOT_TELL and split.variance[k] > 0
        more_prompts = power.prompts_needed(difference, one, each) if open_ else None
        more_seeds = power.seeds_needed(difference, one, each) if open_ else None
        identical = np.array_equal(tables[after], tables[before])
        comparisons.append(
            Comparison(
                after=after,
                before=before,
                mean_after=float(tables[after].mean()),
                mean_before=float(tables[before].mean()),
                difference=difference,
                se=float(np.sqrt(split.variance[k])),
                seed_df=float(split.df[k]) if several else None,
                p=float(p[k]) if several else None,
                p_family=float(min(1.0, p[k] * len(contrasts))) if several else None,
                p_equivalent=None if same is None else float(min(1.0, same[k] * len(contrasts))),
                low=float(alone[k, 0]),
                high=float(alone[k, 1]),
                low_simultaneous=float(together[k, 0]),
                high_simultaneous=float(together[k, 1]),
                low_unpooled=float(by_itself[k, 0]),
                high_unpooled=float(by_itself[k, 1]),
                verdict=verdict,
                prompts_needed=more_prompts,
                seeds_needed=more_seeds,
                words=_words(
                    verdict, difference, alone[k], together[k], len(contrasts), more_prompts, more_seeds, alpha, margin, identical
                ),
                mcnemar=tuple(
                    _mcnemar(after_run, before_run) for after_run, before_run in zip(tables[after], tables[before], strict=True)
                ),
            )
        )
    return tuple(comparisons)


def contrast_matrix(contrasts: Sequence[tuple[str, str]]) -> np.ndarray:
    """L (contrasts x arms that occur): 1 for after, -1 for before."""
    names = list(dict.fromkeys(name for pair in contrasts for name in pair))
    matrix = np.zeros((len(contrasts), len(names)))
    for row, (after, before) in zip(matrix, contrasts, strict=True):
        row[names.index(after)], row[names.index(before)] = 1.0, -1.0
    return matrix


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
    if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
        raise ValueError(f"arm {name!r} has values that are no numbers; a verdict is 0 (failed) or 1 (followed), a share between")
    return array.astype(float)


def _size(array: np.ndarray) -> str:
    return f"{array.shape[0]} seeds x {array.shape[1]} prompts"


def _mcnemar(after: np.ndarray, before: np.ndarray) -> McNemar:
    gained, lost = int(np.sum(after > before)), int(np.sum(after < before))
    p = mcnemar([[0, gained], [lost, 0]], exact=True).pvalue if gained + lost else 1.0
    return McNemar(gained, lost, float(p))


def _summary(own: Parts, split: Split, alpha: float, margin: float | None, tables: dict[str, np.ndarray]) -> dict:
    """The fields of `Family` on the family as a whole, from the parts averaged over its contrasts."""
    several, each = own.seeds > 1, alpha / len(own.mean)
    prompt, seed, resid, df = (part.mean() for part in (own.prompt, own.seed, own.resid, split.df))
    average = Split(prompt, seed, resid, df, own.prompts, own.seeds)
    low, high = power.detectable_interval(average, each) if several else (None, None)

    def points(part: np.ndarray, times: int) -> float:
        return 100 * float(np.sqrt(max(0.0, float(part)) * times))

    return {
        "prompt_sd_points": points(prompt - resid, own.prompts),
        "seed_sd_points": points(seed - resid, own.seeds) if several else None,
        "resid_sd_points": points(resid, own.seeds * own.prompts) if several else None,
        "seed_df": float(df) if several else None,
        "margin": margin,
        "mde": power.detectable(average, each) if several else None,
        "mde_low": low,
        "mde_high": high,
        "homogeneity": homogeneity(tables),
    }


def _words(
    verdict: str,
    difference: float,
    alone: np.ndarray,
    together: np.ndarray,
    count: int,
    prompts: int | None,
    seeds: int | None,
    alpha: float,
    margin: float | None,
    identical: bool,
) -> str:
    """The comparison in one sentence. It quotes the interval that the verdict follows, which holds for all of the family."""
    level = f"{100 * (1 - alpha):g} %"
    if verdict == NO_VERDICT:
        low, high = 100 * alone
        return f"{100 * difference:+.1f} points ({level} interval {low:+.1f} to {high:+.1f}) over prompts, one seed: no verdict"
    family = "" if count == 1 else f" for all {count} comparisons at once"
    if verdict == EQUIVALENT and margin is not None:
        return f"{EQUIVALENT} within {100 * margin:g} points (difference {100 * difference:+.1f}; two one-sided tests{family})"
    if verdict != CANNOT_TELL:
        low, high = sorted(100 * np.sign(difference) * together)
        return f"{verdict} by {100 * abs(difference):.1f} points ({level} interval{family} {low:.1f} to {high:.1f})"
    if identical:
        return f"{CANNOT_TELL}: both arms have the same verdicts"
    if difference == 0:
        return f"{CANNOT_TELL}: no difference was seen"
    ways = [f"about {_rounded(prompts)} prompts"] if prompts else []
    ways += [f"{_rounded(seeds)} seeds"] if seeds else []
    if not ways:
        return f"{CANNOT_TELL}: neither more prompts alone nor more seeds alone would be enough"
    return f"{CANNOT_TELL}: would need {' or '.join(ways)}"


def _rounded(number: int) -> str:
    """Two significant digits, rounded up: 2,100."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return f"{-(-number // unit) * unit:,}"
