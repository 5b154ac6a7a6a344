"""Tasks with several answers to a prompt: pass@k and the majority beside their mean. Descriptive; verdicts are of the mean."""

from typing import Any

from workflow_scripts.report import sections
from workflow_scripts.report.collect import World


def drawn(world: World) -> list[dict]:
    """For each such task: the k of pass@k, and a row for each run, means over its seeds in percent."""
    found = []
    for task in world.config["tasks"]:
        names = [name for name in sections.models(world) if "pass_at" in world.scores[task, world.seeded(name)[0]]]
        if not names:
            continue
        first = world.scores[task, world.seeded(names[0])[0]]
        rows: list[dict[str, Any]] = []
        for name in names:
            scores = [world.scores[task, run] for run in dict.fromkeys(world.seeded(name))]
            each = {k: sum(score["pass_at"][k]["share"] for score in scores) / len(scores) for k in first["pass_at"]}
            vote = sum(score["majority"] for score in scores) / len(scores) if "majority" in first else None
            mean = sections.mean_and_error([world.clusters(task, run) for run in dict.fromkeys(world.seeded(name))])
            cells = [sections.percent(share) for share in each.values()]
            rows.append({"name": name, "mean": mean, "cells": cells, "vote": sections.percent(vote)})
        votes = "majority" in first
        found.append({"label": world.label(task), "n": first["samples"], "at": [*first["pass_at"]], "rows": rows, "votes": votes})
    return found
