"""Capacity against accuracy: the experiments of a rank sweep by the rank of their adapters. Descriptive, without a verdict."""

from workflow_scripts.config.names import METRIC
from workflow_scripts.report import figures
from workflow_scripts.report.collect import World
from workflow_scripts.report.sections import mean_and_error, models, percent


def capacity(world: World) -> dict | None:
    """`picture` and `rows` by IFEval, each experiment with its copies by rank. None without a sweep of anything that answers."""
    answering = set(models(world))
    sweep = {name: body for name, body in world.config.get("sweep", {}).items() if name in answering}
    if not sweep:
        return None
    lines: dict[str, dict[int, list[float]]] = {}
    rows = []
    for name, body in sorted(sweep.items(), key=lambda item: (item[1]["of"], item[1]["r"])):
        runs = world.seeded(name)
        values = [world.scores["ifeval", run][METRIC["ifeval"]] for run in runs]
        lines.setdefault(body["of"], {})[body["r"]] = [100 * value for value in values]
        clusters = [[[value] for value in world.values("ifeval", run)] for run in runs]
        rows.append(
            {
                "name": name,
                "of": body["of"],
                "r": body["r"],
                "parameters": trainable(world, runs),
                "score": mean_and_error(clusters),
                "each": ", ".join(map(percent, values)),
            }
        )
    title = "rank of the adapters against IFEval, one line for each experiment"
    return {"picture": figures.ranks(lines, "IFEval, prompt strict, %", title), "rows": rows}


def trainable(world: World, runs: list[str]) -> str:
    """Trainable parameters as the adapters' manifests say, the same for all seeds; "" where no manifest is there."""
    found = [world.runs[run].manifest.get("constant", {}).get("trainable_parameters") for run in runs]
    known = [count for count in found if count is not None]
    return f"{known[0]:,}" if known else ""
