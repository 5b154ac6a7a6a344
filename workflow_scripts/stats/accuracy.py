"""Accuracy of a run and of an arm over its seeds, with standard errors that know what is independent of what."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workflow_scripts.evaluation.scores import mean_stderr
from workflow_scripts.stats import components
from workflow_scripts.stats.components import Split

Clusters = Sequence[Sequence[bool]]  # for each prompt, the verdict of each of its instructions


@dataclass(frozen=True)
class Accuracy:
    mean: float
    stderr: float | None  # None with one prompt
    low: float | None  # 1 - alpha interval, cut off at 0 and 1
    high: float | None
    seeds: int
    prompts: int
    seeds_covered: bool  # False with one seed: the error then covers the choice of prompts only


def prompt_level(clusters: Clusters) -> list[list[bool]]:
    """One verdict for each prompt: were all its instructions followed?"""
    return [[all(cluster)] for cluster in clusters]


def of_run(clusters: Clusters, alpha: float = 0.05) -> Accuracy:
    """Mean over all items of one run; its error is clustered by prompt (Liang & Zeger 1986, see `scores.mean_stderr`).

    For the prompt-level accuracy, whose items are independent, give `prompt_level(clusters)`.
    """
    mean, stderr = mean_stderr([list(cluster) for cluster in clusters])
    none = np.zeros(())
    split = None if stderr is None else Split(np.array(stderr**2), none, none, none + 1, len(clusters), 1)
    return _accuracy(mean, split, 1, len(clusters), alpha)


def of_arm(runs: Sequence[Clusters], alpha: float = 0.05) -> Accuracy:
    """Mean over the seeds of an arm; its error covers prompts and seeds. The prompts, and their counts of items, are the same.

    Crossed random effects (`components.parts`) on z[s, i] = (sum of the m_i items of prompt i - mean * m_i) * n / N, with
    N items in n prompts. Over one seed the variance over prompts of z / n is Liang & Zeger's (1986, Biometrika 73, 13-22)
    cluster-robust variance, so one seed gives the same as `of_run`. The seed variance is this arm's own: with three seeds its
    degrees of freedom are few, and the interval wide (`components.tail`). Raises ValueError if the runs do not have
    the same prompts and items.
    """
    sizes = [[len(cluster) for cluster in run] for run in runs]
    if not sizes:
        raise ValueError("an arm without runs has no accuracy; give at least one run")
    for number, size in enumerate(sizes, start=1):
        if size != sizes[0]:
            raise ValueError(f"run {number} has other prompts or instructions than run 1; score all seeds on the same prompts")
    if len(runs) == 1:
        return of_run(runs[0], alpha)
    items = np.array(sizes[0])
    sums = np.array([[sum(cluster) for cluster in run] for run in runs], dtype=float)
    mean = float(sums.sum() / (items.sum() * len(runs)))
    if len(items) == 1:
        return _accuracy(mean, None, len(runs), 1, alpha)
    own = components.parts((sums - mean * items) * len(items) / items.sum())
    return _accuracy(mean, components.alone(own), len(runs), len(items), alpha)


def _accuracy(mean: float, split: Split | None, seeds: int, prompts: int, alpha: float) -> Accuracy:
    if split is None:
        return Accuracy(mean, None, None, None, seeds, prompts, seeds > 1)
    half, stderr = float(components.half_width(split, alpha)), float(np.sqrt(split.variance))
    return Accuracy(mean, stderr, max(0.0, mean - half), min(1.0, mean + half), seeds, prompts, seeds > 1)
