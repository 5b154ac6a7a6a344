"""From verdicts to statements: the declared families, the controls, and what each run's own objective says."""

from dataclasses import dataclass, replace
from typing import Any

import numpy

from workflow_scripts.config.names import view_of
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.report.collect import World
from workflow_scripts.stats.clusters import summed
from workflow_scripts.stats.family import BETTER, WORSE, Comparison, Family, again, compare


@dataclass(frozen=True)
class Judged:
    """A declared family with its result."""

    name: str
    title: str
    task: str
    confirmatory: bool  # the one that `report.confirmatory` names; the others are exploratory
    result: Family


@dataclass(frozen=True)
class Control:
    name: str
    what: str  # for people
    passed: bool | None  # None: not judged, with one seed
    comparison: Comparison

    @property
    def state(self) -> str:
        return "not judged" if self.passed is None else "passed" if self.passed else "FAILED"


def contrasts(family: dict) -> list[tuple[str, str]]:
    """(after, before) of each comparison of a declared family."""
    if "pairs" in family:
        names = family["pairs"]
        return [(names[j], names[i]) for i in range(len(names)) for j in range(i + 1, len(names))]
    return [(name, family["reference"]) for name in family["runs"]]


def source(experiments: dict, name: str) -> str:
    """What a run learns to prefer from: its slice, that of its reward model, or a verifier on its slice."""
    body = experiments[name]
    reward, asked = body.get("reward", []), body["slice"]
    if made := body.get("sampled"):  # rewarded answers to the prompts of another slice, as a method that samples itself has them
        reward, asked = made["reward"], made["prompts"]
    found = [experiments[one]["slice"] if one in experiments else f"{one} on {asked}" for one in _named(reward)]
    return " and ".join(found or [body["slice"]]) + (", shuffled" if body.get("placebo") == "shuffled" else "")


def _named(reward: Any) -> list[str]:
    return [reward] if isinstance(reward, str) else [*reward]


def mixed(world: World, family: dict) -> str:
    """In words, from the config, where the runs of a family learn from different data, so that it compares these too; else ""."""
    experiments, groups = world.config["experiments"], dict[str, list[str]]()
    for name in dict.fromkeys(family.get("pairs", family.get("runs", []))):
        if name in experiments:
            groups.setdefault(source(experiments, name), []).append(name)
    return "; ".join(f"{', '.join(names)} from {data}" for data, names in groups.items()) if len(groups) > 1 else ""


def unevenly_tuned(world: World, family: dict) -> str:
    """In words, where the methods of a family had different numbers of trials, so that it compares these too; else ""."""
    tuned = world.config.get("tune", {}).get("experiments", {})
    groups = dict[int, list[str]]()
    for name in dict.fromkeys(family.get("pairs", family.get("runs", []))):
        experiment = view_of(name)[0]
        if name in world.config["experiments"]:
            groups.setdefault(len(tuned[experiment]["trials"]) if experiment in tuned else 1, []).append(name)
    words = {count: f"the best of {count} trials" if count > 1 else "at one setting, not tuned" for count in groups}
    return "; ".join(f"{', '.join(names)}: {words[count]}" for count, names in sorted(groups.items())) if len(groups) > 1 else ""


def turned(families: list[Judged]) -> list[str]:
    """Comparisons that two families make on different bases (`dpo` and `dpo_nf4`) with different verdicts, in words."""
    seen: dict[tuple[str, str, str], list[tuple[str, Comparison]]] = {}
    for family in families:
        for one in family.result.comparisons:
            same = (family.task, _on_any_base(one.after), _on_any_base(one.before))
            seen.setdefault(same, []).append((family.name, one))
    found = []
    for alike in seen.values():
        on_bases = {(one.after, one.before): (family, one) for family, one in alike}.values()
        if len({one.verdict for _, one in on_bases}) > 1:
            found.append("; ".join(f"{one.after} against {one.before}: {one.verdict} ({family})" for family, one in on_bases))
    return found


def _on_any_base(name: str) -> str:
    run, view = view_of(name)
    return run if view in ("nf4", "full") else name


def arms(world: World, task: str, pairs: list[tuple[str, str]]) -> dict[str, numpy.ndarray]:
    return {name: world.arm(task, name) for pair in pairs for name in pair}


def judged(world: World, task: str, pairs: list[tuple[str, str]], alpha: float, margin: float | None = None) -> Family:
    """`stats.family.compare` of a task. Where its items come in groups, these are what it compares, as it would prompts."""
    tables = arms(world, task, pairs)
    if not (groups := world.groups(task)):
        return compare(tables, pairs, alpha, margin)
    if len(set(groups)) < 2:
        raise InputError(f"{task}: all its items are one group, {groups[0]}, and one group has no error; take it out of families")
    found = compare({name: summed(table, groups) for name, table in tables.items()}, pairs, alpha, margin)
    said = [replace(one, words=one.words.replace(" prompts", " groups")) for one in found.comparisons]
    return replace(found, comparisons=tuple(said))


def families(world: World) -> list[Judged]:
    """The declared families. alpha holds for each; one is confirmatory, so that the report as a whole has one error rate.

    A single declared family need not be named.
    """
    report, found = world.config["report"], []
    margin = report["margin"] / 100 if "margin" in report else None
    main = report.get("confirmatory", report["families"][0]["name"])
    for family in report["families"]:
        pairs = contrasts(family)
        result = judged(world, family["task"], pairs, report["alpha"], margin)
        found.append(Judged(family["name"], family["title"], family["task"], family["name"] == main, result))
    return found


def controls(world: World) -> list[Control]:
    """The declared controls, on IFEval but for placebos, which name their task. p is not adjusted: a control is in no family.

    The null control has a variance of its own (`stats.family.again`): the SFT model may vary more between seeds than what is made
    from it. The others are judged as a comparison of the first family is, whose seed variance moderates theirs.
    """
    declared, alpha = world.config["report"]["controls"], world.config["report"]["alpha"]
    pairs = first_of(world, "ifeval")
    found = []
    for name in ("null", "negative", "positive"):
        if name in declared:
            make = null if name == "null" else directed
            found.append(make(world, name, declared[name], pairs, alpha))
    placebo = declared.get("placebo", {"runs": []})
    for run in placebo["runs"]:
        task = placebo["task"]
        found.append(directed(world, f"placebo {run}", placebo | {"run": run}, first_of(world, task), alpha, task))
    return found


def first_of(world: World, task: str) -> list[tuple[str, str]]:
    """The comparisons of the first family of a task."""
    return next((contrasts(family) for family in world.config["report"]["families"] if family["task"] == task), [])


def is_placebo(world: World, name: str) -> bool:
    return "placebo" in world.config["experiments"].get(name, {})


def hollow(world: World, comparison: Comparison) -> bool:
    """Whether a placebo is better, in either place of a comparison, than what is none."""
    after, before = (is_placebo(world, name) for name in (comparison.after, comparison.before))
    return after != before and comparison.verdict == (BETTER if after else WORSE)


def null(world: World, name: str, control: dict, pairs: list[tuple[str, str]], alpha: float) -> Control:
    run, limit = control["run"], control["alpha"]  # by chance it fails in so many reports
    others = [seed + control["seeds_from"] for seed in world.seeds]
    comparison = again(world.arm("ifeval", run, others), world.arm("ifeval", run), (f"{run} again", run), alpha)
    what = f"{run} once more, with seeds {', '.join(map(str, others))}: there must be no difference (p above {limit:.0%})"
    if comparison.p is None:
        return Control(name, f"{what}; with one seed nothing says how much seeds differ", None, comparison)
    return Control(name, what, comparison.p >= limit, comparison)


def directed(world: World, name: str, control: dict, pairs: list[tuple[str, str]], alpha: float, task: str = "ifeval") -> Control:
    after, before = control["run"], control["against"]
    known = [pair for pair in pairs if set(pair) != {after, before}]
    comparison = judged(world, task, [*known, (after, before)], alpha).comparisons[-1]
    better = comparison.low > 0  # with several seeds just where p is below alpha
    how = f"the whole {1 - alpha:.0%} interval above 0" + (", over prompts: one seed" if len(world.seeds) == 1 else "")
    if name.startswith("placebo"):
        reward = "a coin" if world.config["experiments"][after]["placebo"] == "random" else "that of other answers"
        what = f"{after}, whose reward is {reward}, must not be better than {before} on {task} (not {how})"
        return Control(name, what, not better, comparison)
    if name == "negative":
        return Control(name, f"{after} must not be better than {before} (not {how})", not better, comparison)
    return Control(name, f"{after} must be better than {before} ({how})", better, comparison)
