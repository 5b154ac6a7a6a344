"""Do the report's verdicts depend on the precision of the evaluation? The same adapters, answered and judged in several.

    snakemake report --configfile config/config.yaml config/three_seeds.yaml
    PYTHONPATH=. python -m measurements.eval_precision --work precisions --configfile config/config.yaml config/three_seeds.yaml

Needs what was trained, and no score: each run that a family or a control of the report names answers its prompts by the
project's own step, once for each of WAYS, in one process; answers are scored and judged by the functions that the report
calls. `--work` keeps answers, so that a stopped run goes on.

Printed: scores, mean over seeds, with the share of answers that are another text than in fp32 and the verdicts on single
prompts that turned; the order of the experiments; each comparison and control; how much of the adapters is in the model.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

WAYS = {"fp32": ("fp32", "match"), "bf16": ("bf16", "match"), "bf16, adapter fp32": ("bf16", "fp32")}
METRIC = {"ifeval": "prompt_level_strict_acc", "gsm8k": "exact_match"}


def planned(files: list[Path], precision: str, adapter: str) -> Any:
    from workflow_scripts.config.config import Config, load
    from workflow_scripts.config.written import merge
    from workflow_scripts.plan.plan import Plan

    return Plan(Config(merge(load(*files).data, {"eval": {"precision": precision}, "generation": {"adapter": adapter}})))


def named(report: dict) -> dict[str, list[str]]:
    """Task -> what its families and, on IFEval, the controls name."""
    found: dict[str, list[str]] = defaultdict(list)
    for family in report["families"]:
        found[family["task"]] += [*family.get("runs", []), *family.get("pairs", []), *filter(None, [family.get("reference")])]
    for control in report["controls"].values():
        found["ifeval"] += filter(None, [control["run"], control.get("against")])
    return {task: list(dict.fromkeys(names)) for task, names in found.items()}


def answered(plan: Any, task: str, run: str, work: Path) -> tuple[list[dict], list[dict], dict]:
    """(prompts, a run's answers to them, facts of the manifest), by the step that answers in the pipeline."""
    from workflow_scripts.artifacts.manifests import Job
    from workflow_scripts.steps import generate

    results = Path(plan.results)
    made = [*results.glob("data/*.manifest.json"), *results.glob("*/manifest.json"), *results.glob("*/*/manifest.json")]
    job = Job(plan.step(f"generate_{task}", run), made, results / run / f"{task}_responses.manifest.json", work)
    parents = job.parents()
    prompts = parents["prompts"].rows()
    answers, facts = generate.respond(job, parents, prompts)
    rows = [{"key": row["key"], "prompt": row["prompt"], **made} for row, made in zip(prompts, answers, strict=True)]
    return prompts, rows, facts


def judged(files: list[Path], way: str, work: Path) -> tuple[Any, dict, dict]:
    """(the report's world, (task, run) -> answers, run -> what was measured of its adapter)."""
    from workflow_scripts.evaluation import gsm8k, ifeval
    from workflow_scripts.report.collect import World

    plan = planned(files, *WAYS[way])
    config = plan.step("report", "")["config"]
    world, texts, distances = World(config, {}, {}), {}, {}
    seeds_from = config["report"]["controls"]["null"]["seeds_from"]
    for task, names in named(config["report"]).items():
        runs = list(dict.fromkeys(run for name in names for run in world.seeded(name)))
        if task == "ifeval":
            null = config["report"]["controls"]["null"]["run"]
            runs += world.seeded(null, [seed + seeds_from for seed in world.seeds])
        for run in runs:
            prompts, answers, facts = answered(plan, task, run, work)
            score = {"ifeval": ifeval.score, "gsm8k": gsm8k.score}[task]
            world.scores[task, run] = score(prompts, answers, plan.config.data["eval"][task]["strip_think"])
            texts[task, run] = [row["response"] for row in answers]
            if task == "ifeval" and "distance" in facts:
                distances[run] = facts["distance"]
    return world, texts, distances


def table(columns: list[str], rows: list[list[str]]) -> None:
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def scores(worlds: dict[str, Any], texts: dict[str, dict]) -> None:
    (plain, first), *others = worlds.items()
    for task, names in named(first.config["report"]).items():
        means = {
            way: {n: sum(w.scores[task, r][METRIC[task]] for r in w.seeded(n)) / len(w.seeds) for n in names}
            for way, w in worlds.items()
        }
        rows = []
        for name in sorted(names, key=lambda n: -means[plain][n]):
            row = [name, f"{100 * means[plain][name]:.1f}"]
            for way, world in others:
                runs = list(dict.fromkeys(world.seeded(name)))
                pairs = [(a, b) for run in runs for a, b in zip(texts[plain][task, run], texts[way][task, run], strict=True)]
                other = sum(a != b for a, b in pairs) / len(pairs)
                turned = [b - a for run in runs for a, b in zip(first.values(task, run), world.values(task, run), strict=True)]
                row += [f"{100 * means[way][name]:.1f}", f"{100 * other:.1f} %", f"{turned.count(1)}, {turned.count(-1)}"]
            rows.append(row)
        more = [name for way, _ in others for name in (way, "other answers", "verdicts gained, lost")]
        table([task, plain, *more], rows)
        for way, of in means.items():
            print(f"order, {way}: " + ", ".join(sorted(names, key=lambda n, of=of: -of[n])))
        for way, world in others:
            gaps = {
                run: score[METRIC[task]] - first.scores[one, run][METRIC[task]]
                for (one, run), score in world.scores.items()
                if one == task
            }
            run = max(gaps, key=lambda name: abs(gaps[name]))
            print(f"{way}: the run that differs most is {run}, by {100 * gaps[run]:+.2f} points")


def verdicts(worlds: dict[str, Any]) -> None:
    from workflow_scripts.report import judge

    families = {way: judge.families(world) for way, world in worlds.items()}
    rows, turned = [], 0
    for number, family in enumerate(next(iter(families.values()))):
        for place, one in enumerate(family.result.comparisons):
            each = [found[number].result.comparisons[place] for found in families.values()]
            turned += len({other.verdict for other in each}) > 1
            said = [f"{100 * other.difference:+.1f} +- {100 * other.se:.1f}, {other.verdict}" for other in each]
            rows.append([family.name, f"{one.after} - {one.before}", *said])
    controls = [judge.controls(world) for world in worlds.values()]
    for one, *more in zip(*controls, strict=True):
        said = [
            f"{100 * other.comparison.difference:+.1f} +- {100 * other.comparison.se:.1f}, {other.state}"
            for other in (one, *more)
        ]
        rows.append(["control", one.name, *said])
    table(["family", "comparison", *worlds], rows)
    print(f"{turned} of {len(rows) - len(controls[0])} comparisons have another verdict")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--configfile", nargs="+", type=Path, default=[Path("config/config.yaml"), Path("config/three_seeds.yaml")]
    )
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    found = {way: judged(args.configfile, way, args.work) for way in WAYS}
    worlds = {way: world for way, (world, _, _) in found.items()}
    scores(worlds, {way: texts for way, (_, texts, _) in found.items()})
    verdicts(worlds)
    for way, (_, _, distances) in found.items():
        print(f"\n{way}: kept at least {min(one['kept'] for one in distances.values())}; " + json.dumps(distances["dpo"]))


if __name__ == "__main__":
    main()
