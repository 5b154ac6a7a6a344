"""The seed variance that a family moderates: numbers worked by hand, and what it keeps where one arm is wild."""

import itertools

import numpy as np
import pytest
from scipy import special, stats

from workflow_scripts.stats import components
from workflow_scripts.stats.components import Parts
from workflow_scripts.stats.family import again, compare
from workflow_scripts.stats.moderated import moderate, prior_df, trigamma_inverse

REFERENCE = np.hstack([-np.ones((5, 1)), np.eye(5)])
PAIRS = np.array([np.eye(5)[b] - np.eye(5)[a] for a, b in itertools.combinations(range(5), 2)])


def of(seed: list[float], seeds: int = 3) -> Parts:
    """Parts of contrasts with these seed variances."""
    return Parts(np.zeros(len(seed)), np.full(len(seed), 0.5), np.array(seed), np.full(len(seed), 0.1), seeds, 1000)


def test_trigamma_inverse_is_known_at_one_and_a_half():
    assert trigamma_inverse(np.array([np.pi**2 / 6, np.pi**2 / 2])) == pytest.approx([1.0, 0.5])  # trigamma(1), trigamma(1/2)
    far = np.array([1e-6, 1e5])
    assert special.polygamma(1, trigamma_inverse(far)) == pytest.approx(far)


def test_prior_degrees_of_freedom_worked_by_hand():
    # ln s2 = -2, 0, 2: variance 4. With d = 2, trigamma(1) = pi^2 / 6 = 1.644934, which leaves 2.355066 = trigamma(d0 / 2).
    # trigamma(x) = 1 / x^2 + trigamma(1 + x), and at x = 0.78772: 1.61159 + 0.74348 = 2.35507; so d0 = 1.57544.
    assert prior_df(np.exp([-2.0, 0.0, 2.0]), 2) == pytest.approx(1.57544, abs=1e-5)
    assert prior_df(np.array([1.0, 1.1, 0.9]), 2) == np.inf  # no more spread than two degrees of freedom make: 1.6


def test_moderated_variance_worked_by_hand():
    # Variances 1, 1, 4 with d = 2: alike as chance goes (variance of ln: 0.64 < 1.64), d0 is cut to d = 2. The mean is 2.
    # Others of the first: 2.5, of the last: 1. worth 3: F with 2 and 2 (3 - 1) = 4 degrees of freedom, whose tail is
    # 1 / (1 + f / 2)^2: at 1 / 2.5 = 0.4 it is 1 / 1.44 = 0.694444, at 4 / 1 it is 1 / 9.
    # d0: 1.388889 and 2 / 9. First: (1.388889 * 2 + 2 * 1) / 3.388889 = 1.409836. Last: (2 / 9 * 2 + 2 * 4) / (20 / 9) = 3.8,
    # below its own 4, so 4.
    found = moderate(of([1.0, 1.0, 4.0]), 3.0)
    assert found.seed == pytest.approx([1.409836, 1.409836, 4.0], abs=1e-6)
    assert found.df == pytest.approx([3.388889, 3.388889, 2.222222], abs=1e-6)
    assert found.variance == pytest.approx(0.5 + found.seed - 0.1)


def test_the_family_never_lowers_a_variance_and_adds_at_most_as_much_as_there_is():
    rng = np.random.default_rng(3)
    for seeds in (3, 5, 10):
        own = of(list(rng.chisquare(seeds - 1, 6) * np.array([1, 1, 1, 1, 9, 400])), seeds)
        found = moderate(own, 2.7)
        assert (found.seed >= own.seed).all() and (found.df >= seeds - 1).all() and (found.df <= 2 * (seeds - 1)).all()
    wild = moderate(of([1.0, 1.1, 0.9, 1.0, 400.0]), 2.5)
    assert wild.seed[-1] == 400 and wild.df[-1] < 2.1  # judged by its own seeds


def test_two_seeds_and_a_single_contrast_are_left_alone():
    assert moderate(of([1.0, 4.0], 2), 2.0).seed == pytest.approx([1.0, 4.0])
    assert moderate(of([3.0]), 1.0).df == pytest.approx([2.0])


def test_models_without_seeds_have_no_seed_part():
    own = of([1.0, 2.0, 0.0])
    own.resid[2] = 0
    found = moderate(own, 2.0)
    assert found.seed[2] == 0 and found.variance[2] == own.prompt[2] and (found.seed[:2] > 0).all()


def families(contrasts: np.ndarray, sds: list[float], seeds: int, count: int, rng: np.random.Generator) -> Parts:
    """Families without a difference, and means over many prompts, so normal; sds of the arms' seeds in points."""
    arms = np.array(sds)[:, None] * rng.normal(size=(count, len(sds), seeds)) + 0.26 * rng.normal(size=(count, len(sds), seeds))
    by_seed = np.einsum("ka,nas->nks", contrasts, arms + 0.08 * rng.normal(size=(count, len(sds), 1)))
    resid = np.full(by_seed.shape[:2], 2 * 0.26**2 / seeds)
    return Parts(by_seed.mean(axis=-1), 2 * 0.08**2 + resid, by_seed.var(axis=-1, ddof=1) / seeds, resid, seeds, 14042)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(
    "contrasts, sds",
    [
        (REFERENCE, [0.1] * 5 + [2.0]),
        (REFERENCE, [0.1] * 3 + [2.0] * 3),
        (REFERENCE, [2.0] + [0.1] * 5),
        (PAIRS, [0.1] * 4 + [2.0]),
        (PAIRS, [1.0] * 4 + [3.0]),
        (PAIRS, [1.0] * 5),
    ],
)
def test_wrong_verdicts_and_coverage_hold_where_arms_differ_twenty_times(seeds, contrasts, sds):
    """2,000 families: 5 % with an error of 0.5 is above 6 % by chance once in 40; 90 % is what the worst must cover."""
    own = families(contrasts, sds, seeds, 2000, np.random.default_rng(11))
    p = components.p_value(own.mean, moderate(own, components.effective(contrasts)))
    assert np.mean(p.min(axis=1) <= 0.05 / len(contrasts)) < 0.06
    assert (p > 0.05).mean(axis=0).min() > 0.9


def test_the_null_control_fails_as_often_as_it_says_where_the_sft_model_is_wild():
    """SFT's sd is 3 points. Of 400 controls 20 are below 5 %, with an error of 4.4."""
    rng, failed = np.random.default_rng(5), 0
    for _ in range(400):
        first, second = ((rng.random((3, 150)) < 0.5 + 0.03 * rng.normal(size=(3, 1))).astype(int) for _ in range(2))
        failed += again(first, second, ("again", "sft"), 0.05).p < 0.05
    assert 6 < failed < 34


def test_the_null_control_has_the_variance_of_both_arms_and_twice_the_degrees_of_freedom():
    rng = np.random.default_rng(6)
    tables = [(rng.random((3, 400)) < 0.5 + 0.2 * rng.normal(size=(3, 1))).astype(int) for _ in range(2)]
    found = again(*tables, ("again", "sft"), 0.05)
    first, second = (components.parts(table.astype(float)[None]) for table in tables)
    prompt = components.parts((tables[0] - tables[1]).astype(float)[None]).prompt
    assert found.seed_df == 4
    assert found.se**2 == pytest.approx(float((prompt + first.seed + second.seed - first.resid - second.resid)[0]))
    by_seed = [table.mean(axis=1) for table in tables]
    assert found.p == pytest.approx(stats.ttest_ind(*by_seed).pvalue, rel=0.1)  # where the prompts hardly count


def test_a_wild_arm_is_not_called_better_by_what_the_quiet_ones_say():
    """Quiet arms on 2,000 prompts, and one whose seeds differ by 18 points: the family's mean would call it better."""
    rng = np.random.default_rng(0)
    quiet = {f"m{i}": (rng.random((3, 2000)) < 0.5).astype(int) for i in range(5)}
    shares = np.array([[0.5], [0.56], [0.68]])
    arms = quiet | {"wild": (rng.random((3, 2000)) < shares).astype(int)}
    (*_, found) = compare(arms, [(name, "m0") for name in arms if name != "m0"]).comparisons
    assert found.difference > 0.05 and found.verdict == "cannot tell" and found.low < 0
