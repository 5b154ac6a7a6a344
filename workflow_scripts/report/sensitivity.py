"""Sensitivity: each tuned experiment over its grid, by what chose, with the choice marked. Descriptive, without a verdict.

The score of the chosen point is the best of several, so it is too high: how good the chosen one is, its own evaluation says.
"""

from collections import Counter
from typing import Any

import numpy

from workflow_scripts.config.names import DEVELOPMENT, METRIC
from workflow_scripts.report import figures
from workflow_scripts.report.collect import LABEL, World
from workflow_scripts.report.sections import mean_and_error, percent
from workflow_scripts.report.trained import interval_of
from workflow_scripts.stats import accuracy


def sensitivity(world: World) -> dict | None:
    """`picture`, `rows` and what else the page says of each tuned experiment. None where nothing is tuned."""
    tune = world.config.get("tune")
    if tune is None:
        return None
    found = [_experiment(world, name, body) for name, body in tune["experiments"].items()]
    panels = {one["name"]: one for one in found}
    counts = sorted({len(body["trials"]) for body in tune["experiments"].values()})
    return {
        "picture": figures.sensitivity(panels, "score over the points of the grid, the chosen ones marked"),
        "experiments": found,
        "judged": LABEL[tune.get("task", "ifeval")].split(",")[0],
        "counts": " or ".join(map(str, counts)),
        "own": [f"{one['name']} by {one['value']}" for one in found if one["objective"]],
        "declared": [(name, len(body["trials"])) for name, body in tune["experiments"].items() if body["declared"]],
        **{key: tune.get(key) for key in ("per_seed", "curve", "task", "prompts")},
    }


def _experiment(world: World, name: str, body: dict) -> dict:
    runs, tune = world.seeded(name), world.config["tune"]
    selections = {run: found for run in runs if (found := world.runs[run].manifest.get("selection"))}
    chosen = Counter(one["chosen"] for one in selections.values())
    rows = [_row(world, trial, point, body) | {"chosen": chosen[trial]} for trial, point in body["trials"].items()]
    return {
        "name": name,
        "of": body["of"],
        "by": next((one["by"] for one in selections.values()), ""),
        "objective": body["objective"],
        "value": _named(tune["objectives"][next(iter(body["trials"]))]) if body["objective"] else "",
        "rows": rows,
        "seeds": len(selections),
        "edges": edges(body["trials"], chosen),
        "leads": [_lead(run, one, body["objective"]) for run, one in selections.items()],
    }


def _row(world: World, trial: str, point: dict, body: dict) -> dict[str, Any]:
    """A point of the grid: mean over seeds with its 95 % interval, in percent where a task chooses."""
    runs = world.seeded(trial)
    row: dict[str, Any] = {
        "trial": trial,
        "point": point,
        "text": ", ".join(f"{_short(key)} {_plain(point[key])}" for key in point),
    }
    if body["objective"]:
        mean, low, high, each = _of_objective(world, runs)
    else:
        clusters: list = [[[value] for value in world.values(DEVELOPMENT, run)] for run in runs]
        found = accuracy.of_arm(clusters)
        mean, low, high = (None if value is None else 100 * value for value in (found.mean, found.low, found.high))
        each = ", ".join(percent(float(numpy.mean(one))) for one in clusters)
    row |= {"mean": mean, "low": low, "high": high, "each": each, "evaluation": None, "evaluated": ""}
    task = world.config["tune"].get("task", "ifeval")
    if world.config["tune"]["curve"] and (task, runs[0]) in world.scores:
        values = [world.scores[task, run][METRIC[task]] for run in runs]
        row["evaluation"] = 100 * float(numpy.mean(values))
        row["evaluated"] = mean_and_error([[[value] for value in world.values(task, run)] for run in runs])
    return row


def _of_objective(world: World, runs: list[str]) -> tuple[float | None, float | None, float | None, str]:
    """How far training moved the objective that chooses: mean over seeds, interval over seeds, or over rows with one of them."""
    value = world.config["tune"]["objectives"][runs[0].partition(".")[0]]
    changes = [world.trials[run].manifest.get("objective", {}).get("change", {}).get(value) for run in runs]
    if None in changes:
        return None, None, None, ""
    means = [change["mean"] for change in changes]
    one = changes[0] if len(changes) == 1 else _over_seeds(means)
    low, high = interval_of(**one) or (None, None)
    return float(numpy.mean(means)), low, high, ", ".join(f"{mean:+.4f}" for mean in means)


def _over_seeds(means: list[float]) -> dict:
    return {"mean": float(numpy.mean(means)), "stderr": float(numpy.std(means, ddof=1) / len(means) ** 0.5), "n": len(means)}


def edges(trials: dict[str, dict], chosen: Counter) -> list[str]:
    """In words, where the chosen value is the smallest or the largest that was tried of a key."""
    found = []
    for key in next(iter(trials.values())):
        values = {point[key] for point in trials.values()}
        if len(values) < 2 or not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            continue
        for word, edge, way in (("smallest", min(values), "down"), ("largest", max(values), "up")):
            times = sum(count for trial, count in chosen.items() if trials[trial][key] == edge)
            if times:
                of = f" in {times} of {sum(chosen.values())} seeds" if sum(chosen.values()) > 1 else ""
                found.append(
                    f"the best {_short(key)} is the {word} that was tried ({_plain(edge)}){of}: widen the grid, {way}wards"
                )
    return found


def _lead(run: str, selection: dict, objective: bool) -> str:
    """By how much a run's choice won, in words."""
    won = selection["won"]
    difference = f"{won['difference']:.4f}" if objective else f"{100 * won['difference']:.1f} points"
    return f"{run}: {selection['run']} by {difference} over {won['over']}, " + (
        "more than by chance" if won["told"] else "which chance may have made"
    )


def _named(value: str) -> str:
    return f"{value} (less is better)" if value == "loss" else value


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
