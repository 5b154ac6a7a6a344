"""From verdicts to statements: the declared families, the controls, and what each run's own objective says."""

from dataclasses import dataclass

import numpy

from workflow_scripts.report.collect import World
from workflow_scripts.stats.family import Comparison, Family, compare


@dataclass(frozen=True)
class Judged:
    """A declared family with its result."""

    name: str
    title: str
    task: str
    confirmatory: bool  # only IFEval's prompt-level strict accuracy is
    result: Family


@dataclass(frozen=True)
class Control:
    name: str
    what: str  # for people
    passed: bool
    comparison: Comparison


def contrasts(family: dict) -> list[tuple[str, str]]:
    """(after, before) of each comparison of a declared family."""
    if "pairs" in family:
        names = family["pairs"]
        return [(names[j], names[i]) for i in range(len(names)) for j in range(i + 1, len(names))]
    return [(name, family["reference"]) for name in family["runs"]]


def arms(world: World, task: str, pairs: list[tuple[str, str]]) -> dict[str, numpy.ndarray]:
    return {name: world.arm(task, name) for pair in pairs for name in pair}


def families(world: World) -> list[Judged]:
    found = []
    for family in world.config["report"]["families"]:
        pairs = contrasts(family)
        result = compare(arms(world, family["task"], pairs), pairs, world.config["report"]["alpha"])
        found.append(Judged(family["name"], family["title"], family["task"], family["task"] == "ifeval", result))
    return found


def controls(world: World) -> list[Control]:
    """The declared controls on IFEval, each by the test of the first family, with that family's seed variance pooled in.

    A control has one comparison of its own, whose seeds say too little alone. p is not adjusted: a control is in no family.
    """
    declared, alpha = world.config["report"]["controls"], world.config["report"]["alpha"]
    first = next(family for family in world.config["report"]["families"] if family["task"] == "ifeval")
    pairs = contrasts(first)
    tables = arms(world, "ifeval", pairs)
    found = []
    for name in ("null", "negative", "positive"):
        if name not in declared:
            continue
        control = declared[name]
        if name == "null":
            after, before = f"{control['run']} again", control["run"]
            tables[after] = world.arm("ifeval", control["run"], [seed + control["seeds_from"] for seed in world.seeds])
            tables[before] = world.arm("ifeval", before)
        else:
            after, before = control["run"], control["against"]
            tables |= arms(world, "ifeval", [(after, before)])
        known = [pair for pair in pairs if set(pair) != {after, before}]
        comparison = compare(tables, [*known, (after, before)], alpha).comparisons[-1]
        seeds = ", ".join(str(seed + control.get("seeds_from", 0)) for seed in world.seeds)
        if name == "null":
            limit = control["alpha"]  # by chance it fails in so many reports
            what = f"{before} once more, with seeds {seeds}: there must be no difference (p above {limit:.0%})"
            passed = comparison.p >= limit
        elif name == "negative":
            what = f"{after} must not be better than {before} (p below {alpha:.0%})"
            passed = not (comparison.p < alpha and comparison.difference > 0)
        else:
            what = f"{after} must be better than {before} (p below {alpha:.0%})"
            passed = comparison.p < alpha and comparison.difference > 0
        found.append(Control(name, what, passed, comparison))
    return found
