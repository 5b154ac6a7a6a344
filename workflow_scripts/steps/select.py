"""Choose the best of an experiment's trials: its adapter, byte for byte, is the artifact (config/tuning.py: what trials are).

In: the trials' adapters, and what chooses: their scores on development prompts, or the held-out objective in their manifests.
Out: files and facts of the chosen adapter, and under `selection` every trial with its score, the choice, and by how much it won.
The highest mean wins; of equal ones the first of the grid. Nothing of the evaluation is read.

    python -m workflow_scripts.steps.select --step results/dpo_tuned/adapter/manifest.json --out trial/adapter/manifest.json \\
        --inputs results/base/manifest.json results/dpo*/adapter/manifest.json results/dev_dpo*.json
"""

import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from workflow_scripts.artifacts import manifests
from workflow_scripts.artifacts.manifests import Artifact
from workflow_scripts.config.names import METRIC
from workflow_scripts.plumbing import startup
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.steps import cli
from workflow_scripts.tools import card

if TYPE_CHECKING:
    from workflow_scripts.stats.selection import Score

OWN = (
    "format",
    "kind",
    "fingerprint",
    "step",
    "files",
    "parents",
    "package_mismatch",
)  # of an artifact, and no fact of its adapter


def main(job: manifests.Job) -> None:
    from workflow_scripts.stats import selection

    startup.ready()
    trials, by, parents = job.config["trials"], job.config["by"], parents_of(job)
    if "task" in by:
        what, runs = METRIC[by["task"][0]], [verdicts(parents, trial["judged"]) for trial in trials]
        scores = [selection.of_prompts(one) for one in runs]
    else:
        what, runs = by["objective"][0], None
        changes = [[change(parents[f"adapter {run}"], *by["objective"]) for run in one["judged"]] for one in trials]
        scores = [selection.of_changes(one) for one in changes]
    found = selected(trials, what, scores, runs)
    chosen, won = parents[f"adapter {found['run']}"], found["won"]
    certain = "more than by chance" if won["told"] else "which chance may have made"
    print(f"{job.run}: {found['run']} by {what}, {won['difference']:+.4f} over {won['over']}, {certain}", flush=True)
    with manifests.complete(job, "adapter", parents) as draft:
        for name in chosen.data["files"]:
            shutil.copyfile(chosen.file(name), draft.folder / name)
        if (curves := chosen.folder / "metrics.csv").exists():
            shutil.copyfile(curves, draft.folder / curves.name)
        draft.manifest |= {key: value for key, value in chosen.data.items() if key not in OWN}
        draft.manifest["selection"] = found


def selected(trials: list[dict], what: str, scores: "list[Score]", runs: list[list[list[float]]] | None) -> dict:
    """For the manifest: every trial with its score, the choice, and by how much it won."""
    from workflow_scripts.stats import selection

    first, lead = selection.best(scores)[0], asdict(selection.lead(scores, runs))
    told = [
        {key: trial[key] for key in ("name", "run", "point")} | asdict(score) for trial, score in zip(trials, scores, strict=True)
    ]
    won = {"over": trials[lead.pop("second")]["name"], **lead}
    return {"by": what, "trials": told, "chosen": trials[first]["name"], "run": trials[first]["run"], "won": won}


def parents_of(job: manifests.Job) -> dict[str, Artifact]:
    """Role -> artifact. Score files are their own manifests, by other names than `Job.parents` looks for."""
    given = [manifests.read(path) for path in job.inputs if path.suffix == ".json"]
    found = {}
    for role, wanted in job.step["parents"].items():
        match = next((artifact for artifact in given if wanted in artifact.stands_for()), None)
        if match is None:
            raise InputError(f"{job.out}: none of its inputs is the {role} that it was planned with; run snakemake again")
        found[role] = match
    return found


def verdicts(parents: dict[str, Artifact], runs: list[str]) -> list[list[float]]:
    """Of each run what each development prompt counts, 0 to 1. InputError where the scores are of other prompts than the first
    run's."""
    from workflow_scripts.stats import selection

    first = next(parents[role] for role in parents if role.startswith("score "))
    keys = [row["key"] for row in first.data["per_prompt"]]
    found = []
    for run in runs:
        score = parents[f"score {run}"]
        if [row["key"] for row in score.data["per_prompt"]] != keys:
            raise InputError(f"{score.path}: other prompts than {first.path}; delete it and run snakemake again")
        found.append([selection.value(row) for row in score.data["per_prompt"]])
    return found


def change(adapter: Artifact, value: str, good: str) -> dict[str, Any]:
    """How far an adapter's training moved its objective, better being more. InputError where its manifest does not say."""
    moved = adapter.data.get("objective", {}).get("change", {}).get(value)
    if moved is None:
        raise InputError(f"{adapter.path}: says no change of {value}, by which trials are chosen; choose by a task (tune.choose)")
    return moved | {"mean": moved["mean"] if good == "up" else -moved["mean"]}


if __name__ == "__main__":
    cli.run(main, __doc__, describe=card.lay_beside)
