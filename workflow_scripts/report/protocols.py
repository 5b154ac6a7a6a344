"""One skill under several protocols (`protocol_of` of a task), side by side: what the protocol moves, and what the method does.

Descriptive. The questions may be the same and the runs are; what differs is how they are asked (examples, chat template, how an
answer is read), so a score means something beside others of its own protocol alone.
"""

from itertools import combinations
from typing import Any

import numpy

from workflow_scripts.config.names import metric_of
from workflow_scripts.report import sections
from workflow_scripts.report.collect import World


def protocols(world: World) -> list[dict]:
    """For each evaluation that has other protocols beside it: its tasks, a row for each run, and both effects in words.

    The protocol moves a run by the mean over runs of |score under the other - score under the first|; the method moves the score
    by the mean over all pairs of runs of |difference|, under each. Of these pairs, so many are the other way round.
    """
    found = []
    for first, others in world.config.get("protocols", {}).items():
        tasks = [first, *others]
        table = {name: [_mean(world, task, name) for task in tasks] for name in sections.models(world)}
        rows = [
            {"name": name, "cells": [_cell(world, task, name) for task in tasks], "moved": _moved(table[name])} for name in table
        ]
        found.append(
            {
                "tasks": [{"name": task, "label": world.label(task)} for task in tasks],
                "rows": rows,
                "words": [_words(table, tasks, at) for at in range(1, len(tasks))],
            }
        )
    return found


def _mean(world: World, task: str, name: str) -> float:
    runs = dict.fromkeys(world.seeded(name))
    return float(numpy.mean([world.scores[task, run][metric_of(task, world.scores[task, run])] for run in runs]))


def _cell(world: World, task: str, name: str) -> str:
    return sections.mean_and_error([world.clusters(task, run) for run in dict.fromkeys(world.seeded(name))])


def _moved(scores: list[float]) -> list[str]:
    return [f"{100 * (other - scores[0]):+.1f}" for other in scores[1:]]


def _words(table: dict[str, list[float]], tasks: list[str], at: int) -> str:
    own, other = (numpy.array([scores[column] for scores in table.values()]) for column in (0, at))
    by_protocol = 100 * float(numpy.mean(numpy.abs(other - own)))
    text = f"{tasks[at]} against {tasks[0]}: the protocol moves a run by {by_protocol:.1f} points"
    if len(own) < 2:
        return f"{text}. There is one run, so nothing says what a method moves."
    pairs = [*combinations(range(len(own)), 2)]
    gaps: dict[str, Any] = {
        task: numpy.array([one[a] - one[b] for a, b in pairs]) for task, one in ((tasks[0], own), (tasks[at], other))
    }
    by_method = " and ".join(f"{100 * float(numpy.mean(numpy.abs(gap))):.1f} ({task})" for task, gap in gaps.items())
    turned = int(numpy.sum(gaps[tasks[0]] * gaps[tasks[at]] < 0))
    return f"{text}, the method by {by_method}. Of {len(pairs)} pairs of runs, {turned} are the other way round."
