"""How wrong is an evaluation with an adapter on another base than it was trained on? The same adapters on both.

    snakemake results/smollm2/ifeval_dpo.json --configfile config/smollm2.yaml
    PYTHONPATH=. python -m measurements.wrong_base --runs dpo kto --configfile config/smollm2.yaml > wrong_base.json

An adapter that starts from a merge of SFT means nothing on the base without it, and the pipeline refuses to load it there.
Public comparisons have done it: DPO's adapter was trained on the merged weights and evaluated on the base. Here the refusals
are switched off, in this process alone. Needs the runs' adapters and scores; prints each run's score where it belongs and on
the base.
"""

import argparse
import json
from pathlib import Path
from typing import Any


def answers_on_base(plan: Any, run: str, work: Path) -> tuple[list[dict], list[dict]]:
    """(prompts, answers of the base with this run's adapter beside it)."""
    from workflow_scripts.artifacts import manifests
    from workflow_scripts.models import loading
    from workflow_scripts.steps import generate

    results = Path(plan.results)
    files = ("base/manifest.json", f"{run}/adapter/manifest.json", "data/ifeval.manifest.json")
    base, adapter, prompts = (manifests.read(results / file) for file in files)
    adapter.data["base"] = {"path": str(base.path), "weights_sha256": base.weights_sha256}  # which is not true
    loading.check = lambda *_: {}  # type: ignore[assignment]  # what it did when it was trained it does not do here
    rows = prompts.rows()
    job = manifests.Job(plan.step("generate_ifeval", run), [], work / f"{run}.json", work / run)
    made, _ = generate.respond(job, {"start": base, "adapter": adapter, "prompts": prompts}, rows)
    return rows, [{"key": row["key"], "prompt": row["prompt"], **one} for row, one in zip(rows, made, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True)
    parser.add_argument("--work", type=Path, default=Path("wrong_base"), help="keeps answers")
    parser.add_argument("--configfile", nargs="+", type=Path, required=True)
    args = parser.parse_args()
    from workflow_scripts.config.config import load
    from workflow_scripts.evaluation import ifeval
    from workflow_scripts.plan.plan import Plan

    plan, metric = Plan(load(*args.configfile)), "prompt_level_strict_acc"
    found = {}
    for run in args.runs:
        rows, made = answers_on_base(plan, run, args.work)
        right = json.loads((Path(plan.results) / f"ifeval_{run}.json").read_text(encoding="utf-8"))
        found[run] = {"where_it_belongs": right[metric], "on_the_base": ifeval.score(rows, made, False)[metric]}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
