"""Families of tasks whose items come in groups: errors by hand, and coverage where the items of a group go together."""

import numpy as np
import pytest

from workflow_scripts.evaluation.scores import mean_stderr
from workflow_scripts.stats.clusters import summed
from workflow_scripts.stats.family import compare

GROUPS = ["a"] * 5 + ["b"] * 3 + ["c"] * 2 + ["d"]


def test_one_seed_has_the_clustered_error_of_the_mean_difference():
    draw = np.random.default_rng(1)
    arms = {name: draw.integers(0, 2, (1, 11)).astype(float) for name in ("x", "y")}
    (one,) = compare({name: summed(table, GROUPS) for name, table in arms.items()}, [("x", "y")]).comparisons
    difference = (arms["x"] - arms["y"])[0]
    clusters = [[difference[i] for i, group in enumerate(GROUPS) if group == name] for name in "abcd"]
    mean, error = mean_stderr(clusters)
    assert one.difference == pytest.approx(mean) and one.se == pytest.approx(error)
    assert one.mean_after == pytest.approx(arms["x"].mean()) and one.mean_before == pytest.approx(arms["y"].mean())


def test_a_group_for_each_item_and_groups_of_one_size():
    draw = np.random.default_rng(2)
    table = draw.integers(0, 2, (3, 12)).astype(float)
    np.testing.assert_allclose(summed(table, range(100, 112)), table)
    pairs = summed(table, [i // 2 for i in range(12)])
    np.testing.assert_allclose(pairs, table.reshape(3, 6, 2).mean(-1))
    np.testing.assert_allclose(summed(table, GROUPS + ["e"]).mean(-1), table.mean(-1))


@pytest.mark.slow
def test_intervals_cover_where_items_of_a_group_go_together_and_without_groups_they_do_not():
    """Thirty subjects of 10 to 40 questions, one seed; the difference of two arms varies by subject, and is 0 on the whole."""
    draw = np.random.default_rng(5)
    covered, naive, worlds = 0, 0, 600
    for _ in range(worlds):
        sizes = draw.integers(10, 41, 30)
        groups = np.repeat(np.arange(30), sizes)
        level, shift = draw.normal(0, 0.5, 30)[groups], draw.normal(0, 0.8, 30)[groups]
        item = draw.normal(0, 0.5, len(groups))
        chance = {"x": level + item + shift / 2, "y": level + item - shift / 2}
        arms = {name: (draw.random((1, len(groups))) < 1 / (1 + np.exp(-z))).astype(float) for name, z in chance.items()}
        (one,) = compare({name: summed(table, groups) for name, table in arms.items()}, [("x", "y")]).comparisons
        (other,) = compare(arms, [("x", "y")]).comparisons
        covered += one.low <= 0 <= one.high
        naive += other.low <= 0 <= other.high
    assert 0.92 < covered / worlds < 0.98 and naive / worlds < 0.8
