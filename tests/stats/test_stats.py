"""Families of comparisons: what other programs and a hand say of the same numbers, edge cases, and the level of the verdicts."""

import itertools

import numpy as np
import pandas
import pytest
from scipy import stats
from statsmodels.api import OLS
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from tests.support import cpu
from workflow_scripts.stats import accuracy, components, power
from workflow_scripts.stats.family import compare, homogeneity


def random_arms(count: int, seeds: int, prompts: int = 541, seed: int = 0, gain: float = 0.0, seed_sd: float = 0.0) -> dict:
    """Arms m0, m1, ... of 0 and 1 on prompts of unequal difficulty; each is `gain` logits better than the one before."""
    rng = np.random.default_rng(seed)
    difficulty = 2 * rng.normal(size=prompts)
    arms = {}
    for number in range(count):
        logit = difficulty + 0.5 * rng.normal(size=prompts) + gain * number - 1 + seed_sd * rng.normal(size=(seeds, 1))
        arms[f"m{number}"] = (rng.random((seeds, prompts)) < 1 / (1 + np.exp(-logit))).astype(int)
    return arms


def against_first(arms: dict) -> list[tuple[str, str]]:
    return [(name, "m0") for name in arms if name != "m0"]


def test_variance_parts_worked_by_hand():
    # Prompt means 1, 0.5, 0, 0.5; seed means 0.75, 0.25; grand mean 0.5.
    # Prompts: (0.25 + 0 + 0.25 + 0) / 3 / 4 prompts = 1/24. Seeds: (1/16 + 1/16) / 1 / 2 seeds = 1/16.
    # Residuals: row 0 is 1 - 1 - .25, 1 - .5 - .25, 0 - 0 - .25, 1 - .5 - .25 = -.25, .25, -.25, .25; row 1 has the signs turned.
    # MS = 8 / 16 / 3 = 1/6, over n S = 8: 1/48.
    own = components.parts(np.array([[1.0, 1, 0, 1], [1, 0, 0, 0]]))
    assert (own.mean, own.prompt, own.seed, own.resid) == pytest.approx((0.5, 1 / 24, 1 / 16, 1 / 48))
    alone = components.alone(own)
    assert (alone.variance, alone.df) == (pytest.approx(1 / 24 + 1 / 16 - 1 / 48), 1)  # = 1/12


def test_variance_parts_are_the_mean_squares_of_the_two_way_anova():
    table = random_arms(1, 4, 30)["m0"]
    seeds, prompts = np.indices(table.shape)
    fit = ols(
        "y ~ C(seed) + C(prompt)", pandas.DataFrame({"y": table.ravel(), "seed": seeds.ravel(), "prompt": prompts.ravel()})
    ).fit()
    squares = anova_lm(fit)["mean_sq"] / table.size
    own = components.parts(table.astype(float))
    assert (own.seed, own.prompt, own.resid) == pytest.approx((squares["C(seed)"], squares["C(prompt)"], squares["Residual"]))


def test_one_seed_has_the_paired_t_interval_and_no_verdict():
    arms = random_arms(2, 1, gain=2.0)
    family = compare(arms, [("m1", "m0")], margin=0.5)
    (found,) = family.comparisons
    expected = stats.ttest_rel(arms["m1"][0], arms["m0"][0])
    assert expected.pvalue < 1e-6  # over prompts the difference is beyond doubt
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert (found.verdict, found.p, found.p_family, found.p_equivalent, found.seed_df) == ("no verdict", None, None, None, None)
    assert found.words.endswith("over prompts, one seed: no verdict")
    assert not any(word in found.words for word in ("better", "worse", "cannot tell", "equivalent"))
    assert not family.seeds_covered and family.seed_sd_points is None and family.homogeneity is None and family.mde is None
    assert found.seeds_needed is None and found.prompts_needed is None
    assert set(family.table()["verdict"]) == {"no verdict"} and family.table()["p"].isna().all()


@pytest.mark.parametrize("count", [2, 5, 7])
def test_contrasts_are_worth_what_theory_says(count):
    pairs = np.array([np.eye(count)[b] - np.eye(count)[a] for a, b in itertools.combinations(range(count), 2)])
    assert components.effective(pairs) == pytest.approx(count - 1)
    methods = count - 1
    assert components.effective(np.eye(count)[1:] - np.eye(count)[0]) == pytest.approx(4 * methods / (methods + 3))


def test_bonferroni_and_mcnemar_are_those_of_statsmodels():
    arms = random_arms(5, 3, gain=0.3)
    family = compare(arms, against_first(arms))
    p = [comparison.p for comparison in family.comparisons]
    assert [one.p_family for one in family.comparisons] == pytest.approx(multipletests(p, method="bonferroni")[1])
    assert {comparison.verdict for comparison in family.comparisons} == {"better", "cannot tell"}
    for comparison in family.comparisons:
        for seed, found in enumerate(comparison.mcnemar):
            after, before = arms[comparison.after][seed], arms["m0"][seed]
            table = [[np.sum((before == x) & (after == y)) for y in (0, 1)] for x in (0, 1)]
            assert (found.only_after, found.only_before) == (table[0][1], table[1][0])
            assert found.p == pytest.approx(mcnemar(table, exact=True).pvalue)
    turned = compare(arms, [(before, after) for after, before in against_first(arms)])
    assert {comparison.verdict for comparison in turned.comparisons} == {"worse", "cannot tell"}


def test_what_better_by_quotes_is_the_interval_that_holds_for_the_family_and_it_leaves_out_zero_just_there():
    arms = random_arms(6, 3, gain=0.25, seed_sd=0.1)
    found = compare(arms, against_first(arms)).comparisons
    assert {one.verdict for one in found} == {"better", "cannot tell"}
    for one in found:
        assert one.low_simultaneous < one.low < one.high < one.high_simultaneous
        assert (one.verdict == "better") == (one.low_simultaneous > 0) == (one.p_family <= 0.05)
        if one.verdict == "better":
            quoted = f"for all 5 comparisons at once {100 * one.low_simultaneous:.1f} to {100 * one.high_simultaneous:.1f})"
            assert one.words.endswith(quoted)


def test_equivalent_is_said_where_a_difference_is_surely_within_the_margin_and_nowhere_else():
    rng, prompts = np.random.default_rng(8), 4000
    difficulty = 2 * rng.normal(size=prompts)
    gains = {"start": 0.0, "same": 0.0, "far": 2.0}
    arms = {name: (rng.random((5, prompts)) < 1 / (1 + np.exp(-difficulty - gain))).astype(int) for name, gain in gains.items()}
    contrasts = [("same", "start"), ("far", "start")]
    found = compare(arms, contrasts, margin=0.05).comparisons
    assert [one.verdict for one in found] == ["equivalent", "better"]
    assert found[0].words.startswith("equivalent within 5 points (difference ") and found[1].p_equivalent == 1
    assert [one.verdict for one in compare(arms, contrasts).comparisons] == ["cannot tell", "better"]  # none is declared
    assert [one.verdict for one in compare(arms, contrasts, margin=0.0005).comparisons] == ["cannot tell", "better"]
    with pytest.raises(ValueError, match="margin is 2; expected a fraction"):
        compare(arms, contrasts, margin=2)


def test_equivalence_is_two_one_sided_tests_of_student():
    split = components.Split(np.array(0.0), np.array(4e-4), np.array(0.0), np.array(6.0), 10**7, 7)
    p = components.p_equivalent(np.array(0.01), split, 0.08)
    assert p == pytest.approx(max(stats.t.sf((0.01 + 0.08) / 0.02, 6), stats.t.cdf((0.01 - 0.08) / 0.02, 6)), rel=1e-4)


def of_seeds(df: float, seed: float = 1.0, prompt: float = 0.0, resid: float = 0.0) -> components.Split:
    return components.Split(np.array(prompt), np.array(seed), np.array(resid), np.array(float(df)), 10**7, int(df) + 1)


@pytest.mark.parametrize("df, alpha", [(1, 0.05), (2, 0.05), (2, 0.005), (4, 0.01), (18, 0.001)])
def test_where_seeds_are_all_the_interval_is_student_s_with_their_degrees_of_freedom(df, alpha):
    assert components.half_width(of_seeds(df), alpha) == pytest.approx(stats.t.isf(alpha / 2, df), rel=1e-4)
    assert components.p_value(np.array(stats.t.isf(alpha / 2, df)), of_seeds(df)) == pytest.approx(alpha, rel=1e-3)


def test_an_interval_is_found_in_a_few_steps_and_its_p_is_alpha(monkeypatch):
    """Newton's last step ends on the bracket itself; halving from there took three times as many, and most of a report's time."""
    asked, tail = [], components.tail
    monkeypatch.setattr(components, "tail", lambda *given: asked.append(1) or tail(*given))
    own = components.parts(np.stack(list(random_arms(6, 3, prompts=200, gain=0.3, seed_sd=0.1).values())).astype(float))
    for split in (components.alone(own), *(of_seeds(df, 2.0, prompt, 0.5) for df in (2, 7) for prompt in (0.0, 1.0, 100.0))):
        asked.clear()
        half = components.half_width(split, 0.01)
        assert len(asked) <= 12
        assert components.p_value(half, split) == pytest.approx(0.01, rel=1e-7)


def test_prompts_and_seeds_together_are_fisher_s_behrens_fisher():
    """P(|Z + sqrt(2) T| > x), T Student's with 2 degrees of freedom, is drawn."""
    rng = np.random.default_rng(2)
    drawn = np.abs(rng.normal(size=10**6) + 2**0.5 * rng.standard_t(2, size=10**6))
    for x in (2.0, 5.0):
        p = components.p_value(np.array(x), of_seeds(2, seed=2.0, prompt=1.0))
        assert p == pytest.approx(np.mean(drawn > x), rel=0.02)


def test_power_is_the_noncentral_t():
    for df, alpha, effect in ((2, 0.05, 3.0), (5.33, 0.05 / 6, 4.0), (40, 0.05, 2.8)):
        critical = stats.t.isf(alpha / 2, df)
        expected = stats.nct.sf(critical, df, effect) + stats.nct.cdf(-critical, df, effect)
        assert power.power(effect, of_seeds(df), alpha) == pytest.approx(expected, abs=1e-3)
        assert power.power(power.detectable(of_seeds(df), alpha), of_seeds(df), alpha) == pytest.approx(0.8, abs=1e-6)
    low, high = power.detectable_interval(of_seeds(4), 0.05)
    one = power.detectable(of_seeds(4), 0.05)
    assert (low / one, high / one) == pytest.approx([(4 / stats.chi2.ppf(q, 4)) ** 0.5 for q in (0.975, 0.025)])


def test_the_number_of_prompts_or_seeds_needed_just_suffices():
    split, alpha, effect = components.Split(*map(np.array, (2e-4, 1.2e-4, 1e-4, 4.0)), 541, 3), 0.01, 0.065
    prompts, seeds = power.prompts_needed(effect, split, alpha), power.seeds_needed(effect, split, alpha)
    assert prompts > 541 and seeds > 3

    def at(n: float, s: float) -> float:
        prompt, between, resid = 1e-4 * 541 / n, 2e-5 * 3 / s, 1e-4 * 541 * 3 / (n * s)
        there = components.Split(*map(np.array, (prompt + resid, between + resid, resid, 4.0 * (s - 1) / 2)), n, s)
        return power.power(effect, there, alpha)

    assert at(prompts, 3) >= 0.8 > at(prompts - 1, 3)
    assert at(541, seeds) >= 0.8 > at(541, seeds - 1)
    assert power.prompts_needed(0.001, split, alpha) is None  # the seeds alone hide it
    assert power.seeds_needed(0.001, split, alpha) is None


def test_what_cannot_be_told_says_what_it_would_take():
    arms = random_arms(2, 3, seed=4, gain=0.1)
    (found,) = compare(arms, [("m1", "m0")]).comparisons
    assert found.verdict == "cannot tell" and found.seeds_needed > 3
    assert found.words.startswith("cannot tell: would need about ") and found.words.endswith(" 110 seeds")
    assert 100 < found.seeds_needed <= 110  # two digits are said


def test_identical_verdicts_cannot_be_told_apart():
    arms = random_arms(3, 3, seed_sd=0.3)
    arms["m1"] = arms["m0"].copy()
    for contrasts in ([("m1", "m0")], [("m1", "m0"), ("m2", "m0")]):
        found = compare(arms, contrasts).comparisons[0]
        assert (found.difference, found.p, found.verdict) == (0, 1, "cannot tell")
        assert (found.prompts_needed, found.seeds_needed) == (None, None)
        assert found.words == "cannot tell: both arms have the same verdicts"
    alone = compare(arms, [("m1", "m0")])
    assert (alone.comparisons[0].low, alone.comparisons[0].high, alone.mde) == (0, 0, 0)


def test_no_variance_and_a_difference_is_a_sign_test():
    none, all_ = np.zeros((3, 10)), np.ones((3, 10))
    found = compare({"none": none, "all": all_}, [("all", "none")]).comparisons[0]
    assert (found.difference, found.p, found.verdict) == (1, pytest.approx(stats.binomtest(10, 10).pvalue), "better")
    lower = stats.binomtest(10, 10).proportion_ci(0.95, "exact").low
    assert (found.low, found.high) == (pytest.approx(2 * lower - 1), 1)
    few = compare({"none": none[:, :4], "all": all_[:, :4]}, [("none", "all")]).comparisons[0]
    assert few.verdict == "cannot tell"  # 4 of 4 happens by chance in one of 8


def test_homogeneity_finds_an_uneven_arm_and_keeps_its_level_with_a_shared_parent():
    rng = np.random.default_rng(5)

    def refused(own: list[float], families: int = 2000) -> float:
        means = rng.normal(size=(families, 1, 3)) * 3 + rng.normal(size=(families, len(own), 3)) * np.array(own)[:, None]
        checks = [homogeneity({str(a): runs[:, None] for a, runs in enumerate(family)}) for family in means]
        return float(np.mean([check.p <= 0.05 for check in checks if check]))

    assert 0.03 < refused([1.0] * 6) < 0.065  # 0.05 with an error of 0.005
    assert refused([1.0] * 5 + [10.0]) > 0.5
    assert homogeneity({"a": np.eye(3), "b": np.eye(3)}) is None  # two arms: their residuals are one another's negative


def test_a_table_has_a_row_for_each_comparison():
    arms = random_arms(3, 3)
    family = compare(arms, against_first(arms))
    table = family.table()
    assert list(table["after"]) == ["m1", "m2"] and list(table["p_family"]) == [found.p_family for found in family.comparisons]


@pytest.mark.parametrize(
    "arms, contrasts, words",
    [
        ({"a": np.zeros((3, 5)), "b": np.zeros((2, 5))}, [("a", "b")], "'b' has 2 seeds x 5 prompts, arm 'a' has 3 seeds x 5"),
        ({"a": np.zeros((3, 5)), "b": np.zeros((3, 4))}, [("a", "b")], "'b' has 3 seeds x 4 prompts"),
        ({"a": np.zeros(5), "b": np.zeros(5)}, [("a", "b")], "1 dimensions; expected 2"),
        ({"a": np.zeros((0, 5)), "b": np.zeros((0, 5))}, [("a", "b")], "at least 1 seed and 2 prompts"),
        ({"a": np.zeros((3, 1)), "b": np.zeros((3, 1))}, [("a", "b")], "at least 1 seed and 2 prompts"),
        ({"a": np.zeros((1, 2)), "b": np.array([[0, np.nan]])}, [("a", "b")], "'b' has values that are no numbers"),
        ({"a": np.zeros((1, 2)), "b": np.array([["0", "1"]])}, [("a", "b")], "'b' has values that are no numbers"),
        ({"a": np.zeros((1, 2))}, [("a", "b")], "names 'b', which is not among the arms a"),
        ({"a": np.zeros((1, 2))}, [("a", "a")], "compares an arm with itself"),
        ({"a": np.zeros((1, 2)), "b": np.zeros((1, 2))}, [("a", "b"), ("b", "a")], "declared twice"),
        ({"a": np.zeros((1, 2))}, [], "no contrasts"),
    ],
)
def test_what_is_no_family_is_refused_in_words(arms, contrasts, words):
    with pytest.raises(ValueError, match=words):
        compare(arms, contrasts)


def test_alpha_out_of_range_is_refused():
    with pytest.raises(ValueError, match="alpha is 5; expected a number between 0 and 1"):
        compare(random_arms(2, 1), [("m1", "m0")], alpha=5)


def test_clustered_error_is_that_of_statsmodels():
    rng = np.random.default_rng(6)
    clusters = [list(rng.random(size) < rng.random()) for size in rng.integers(1, 4, 60)]
    groups = np.repeat(np.arange(60), [len(cluster) for cluster in clusters])
    values = np.concatenate(clusters).astype(float)
    # The same small-sample factor: G / (G - 1) * (N - 1) / (N - 1) for a constant alone.
    expected = OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": groups})
    found = accuracy.of_run(clusters)
    assert (found.mean, found.stderr) == pytest.approx((expected.params[0], expected.bse[0]))
    assert accuracy.of_arm([clusters]) == found
    strict = accuracy.of_run(accuracy.prompt_level(clusters))
    passed = [all(cluster) for cluster in clusters]
    assert (strict.mean, strict.stderr) == pytest.approx((np.mean(passed), stats.sem(passed)))


def test_accuracy_of_an_arm_covers_prompts_and_seeds():
    runs = [[[bool(verdict)] for verdict in run] for run in random_arms(1, 3, 40, seed=2, seed_sd=1.5)["m0"]]
    own = components.parts(np.array(runs, dtype=float)[:, :, 0])
    found = accuracy.of_arm(runs)
    assert own.seed > own.resid and found.seeds_covered
    assert (found.mean, found.stderr) == pytest.approx((own.mean, (own.prompt + own.seed - own.resid) ** 0.5))
    twice = accuracy.of_arm([[item * 2 for item in run] for run in runs])  # copies of an item are no new information
    assert (twice.mean, twice.stderr, twice.low) == pytest.approx((found.mean, found.stderr, found.low))
    with pytest.raises(ValueError, match="run 2 has other prompts or instructions than run 1"):
        accuracy.of_arm([runs[0], runs[1][:-1]])
    assert accuracy.of_arm([[[True, False]], [[True, True]]]).stderr is None  # one prompt


def test_thirty_five_runs_take_seconds():
    arms = random_arms(7, 5, seed_sd=0.1)
    before = cpu.seconds()
    compare(arms, against_first(arms))
    compare(arms, list(itertools.combinations(list(arms)[:5], 2)))
    assert cpu.seconds() - before < 5
