"""Items that come in groups (questions on one passage, subjects of MMLU): a group is what is drawn at random, not an item.

Everything that judges tables seeds x prompts judges groups instead, given a value for each that makes the same means:

    z[s, g] = (sum over i in g of x[s, i] - mean m_g) G / N + mean

with N items in G groups of m_g, and the mean over all seeds and items of an arm. Over one seed the variance over groups of a
difference of such values, over G, is Liang & Zeger's (1986, Biometrika 73, 13-22) cluster-robust variance of the difference of
means, with the factor G / (G - 1) of `evaluation/scores.py:mean_stderr`; with a group for each item z is x.
"""

from collections.abc import Sequence

import numpy as np


def summed(table: np.ndarray, groups: Sequence[object]) -> np.ndarray:
    """(seeds, groups) from (seeds, items); groups: of each item. A value may lie outside 0 to 1 where groups differ in size."""
    _, which = np.unique(np.asarray([str(group) for group in groups]), return_inverse=True)
    member = np.equal.outer(which, np.arange(which.max() + 1)).astype(float)  # items x groups
    sizes, mean = member.sum(axis=0), table.mean()
    return (table @ member - mean * sizes) * len(sizes) / len(which) + mean
