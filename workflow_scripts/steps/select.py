"""Choose the best of an experiment's trials: its adapter, byte for byte, is the artifact (config/tuning.py: what trials are).

In: the trials' adapters, and what chooses: their scores on development prompts, or the held-out objective in their manifests.
Out: files and facts of the chosen adapter, and under `selection` every trial with its score, the choice, and by how much it won.
The highest mean wins; of equal ones the first of the grid. Nothing of the evaluation is read.

    python -m workflow_scripts.steps.select --step results/dpo_tuned/adapter/manifest.json --out trial/adapter/manifest.json \\
        --inputs results/base/manifest.json results/dpo*/adapter/manifest.json results/dev_dpo*.json
"""

import shutil
from dataclasses import asdict
from typing import Any

from workflow_scripts.artifacts import manifests
from workflow_scripts.artifacts.manifests import Artifact
from workflow_scripts.config.names import METRIC
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.steps import cli
from workflow_scripts.tools import card

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

    trials, by, parents = job.config["trials"], job.config["by"], parents_of(job)
    if "task" in by:
        what, runs = METRIC[by["task"][0]], [verdicts(parents, trial["judged"]) for trial in trials]
        scores = [selection.of_prompts(one) for one in runs]
    else:
        what, runs = by["objective"][0], None
        scores = [
            selection.of_changes([change(parents[f"adapter {run}"], *by["objective"]) for run in one["judged"]]) for one in trials
        ]
    first, lead = selection.best(scores)[0], selection.lead(scores, runs)
    told = [
        {"name": trial["name"], "run": trial["run"], "point": trial["point"], **asdict(score)}
        for trial, score in zip(trials, scores, strict=True)
    ]
    over = trials[lead.second]["name"]
    won = asdict(lead) | {"over": over}
    del won["second"]
    chosen = parents[f"adapter {trials[first]['run']}"]
    certain = "more than by chance" if lead.told else "which can't be told from chance"
    print(
        f"{job.run}: {trials[first]['run']}, by {what} {scores[first].mean:.4f}: {lead.difference:+.4f} over {over}, {certain}",
        flush=True,
    )
    with manifests.complete(job, "adapter", parents) as draft:
        for name in chosen.data["files"]:
            shutil.copyfile(chosen.file(name), draft.folder / name)
        if (curves := chosen.folder / "metrics.csv").exists():
            shutil.copyfile(curves, draft.folder / curves.name)
        draft.manifest |= {key: value for key, value in chosen.data.items() if key not in OWN}
        draft.manifest["selection"] = {
            "by": what,
            "trials": told,
            "chosen": trials[first]["name"],
            "run": trials[first]["run"],
            "won": won,
        }


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
    """Of each run 0 or 1 for each development prompt. InputError where the scores are of other prompts than the first run's."""
    from workflow_scripts.stats import selection

    first = next(parents[role] for role in parents if role.startswith("score "))
    keys = [row["key"] for row in first.data["per_prompt"]]
    found = []
    for run in runs:
        score = parents[f"score {run}"]
        if [row["key"] for row in score.data["per_prompt"]] != keys:
            raise InputError(f"{score.path}: other prompts than {first.path}; delete it and run snakemake again")
        found.append([float(selection.passed(row)) for row in score.data["per_prompt"]])
    return found


def change(adapter: Artifact, value: str, good: str) -> dict[str, Any]:
    """How far an adapter's training moved its objective, better being more. InputError where its manifest does not say."""
    moved = adapter.data.get("objective", {}).get("change", {}).get(value)
    if moved is None:
        raise InputError(f"{adapter.path}: says no change of {value}, by which trials are chosen; choose by a task (tune.choose)")
    return moved | {"mean": moved["mean"] if good == "up" else -moved["mean"]}


if __name__ == "__main__":
    cli.run(main, __doc__, describe=card.lay_beside)
