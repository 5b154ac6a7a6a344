"""What a report reads: score files, which it was planned with, and what lies beside them. Decides what may be compared.

Score files are the inputs. Answers, adapters' manifests, curves, run.json and benchmark files are read where they lie, never make
the report stale, and may be missing.
"""

import copy
import json
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy
import pandas

from workflow_scripts.artifacts import manifests
from workflow_scripts.artifacts.manifests import Job
from workflow_scripts.config.names import DEVELOPMENT, METRIC, answered, metric_of, run_name, view_of
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.stats.selection import value

LABEL = {
    "ifeval": "IFEval, prompt-level strict accuracy",
    "gsm8k": "GSM8K, exact match",
    "mmlu": "MMLU, accuracy",
    "truthfulqa": "TruthfulQA, mc1",
}
# Keys of a generation config that choose no token among the likely ones.
NO_SETTING = ("_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "do_sample")


@dataclass
class Run:
    """One experiment with one seed, as far as it is there."""

    name: str
    experiment: str
    seed: int
    folder: Path
    manifest: dict = field(default_factory=dict)  # of the adapter; {} for the base, or where it is missing
    curves: pandas.DataFrame | None = None
    phases: dict[str, dict] = field(default_factory=dict)  # phase -> run.json's seconds, peak memory and device
    drawn: dict[str, dict] = field(
        default_factory=dict
    )  # the answers that its slice was chosen from, if any -> run.json's, `count`


@dataclass
class World:
    """All that the page shows, read and checked."""

    config: dict  # of the step: report, seeds, experiments, tasks, device
    scores: dict[tuple[str, str], dict]  # (task, run) -> score file
    runs: dict[str, Run]
    warnings: list[str] = field(default_factory=list)
    trials: dict[str, Run] = field(default_factory=dict)  # of `tune:`, by run; those that are experiments stand in `runs` too

    @property
    def seeds(self) -> list[int]:
        return self.config["seeds"]

    def seeded(self, experiment: str, seeds: list[int] | None = None) -> list[str]:
        """The runs of an experiment, one for each seed; a model that is not trained here stands for itself with each."""
        if experiment in self.config.get("models", []):
            return [experiment for _ in self.seeds]
        return [run_name(experiment, seed) for seed in (self.seeds if seeds is None else seeds)]

    def arm(self, task: str, experiment: str, seeds: list[int] | None = None) -> numpy.ndarray:
        """Values of an experiment's runs: 0 to 1, seeds x prompts, prompts in one order for all."""
        return numpy.array([self.values(task, run) for run in self.seeded(experiment, seeds)], dtype=float)

    def label(self, task: str) -> str:
        """A task with its metric, for people."""
        metrics = {score["metric"] for (one, _), score in self.scores.items() if one == task and task not in LABEL}
        drawn = f", mean of {n} answers" if (n := self.samples(task)) > 1 else ""
        return (LABEL.get(task) or f"{task}, {', '.join(sorted(metrics))}") + drawn

    def groups(self, task: str) -> list[str]:
        """The group of each item of a task, in the order of `arm`; [] where each stands for itself."""
        rows = next(score["per_prompt"] for (one, _), score in self.scores.items() if one == task)
        return [row["group"] for row in rows] if all("group" in row for row in rows) else []

    def clusters(self, task: str, run: str) -> list[list[float]]:
        """Values by what belongs together: each prompt for itself, but for a task whose items come in groups (`group_by`)."""
        found: dict[object, list[float]] = {}
        for row in self.scores[task, run]["per_prompt"]:
            found.setdefault(("group", row["group"]) if "group" in row else row["key"], []).append(value(row))
        return list(found.values())

    def values(self, task: str, run: str) -> list[float]:
        """What each prompt counts: 1 or 0 for a verdict, else a number between them (stats/selection.py)."""
        return [value(row) for row in self.scores[task, run]["per_prompt"]]

    def samples(self, task: str) -> int:
        """Answers to a prompt of a task."""
        return next((score.get("samples", 1) for (one, _), score in self.scores.items() if one == task), 1)


def read(job: Job) -> World:
    """Everything for one page. InputError where score files are not those that were planned, or can't be compared."""
    given = {str(path) for path in job.inputs}
    results = job.out.parent.parent
    scores: dict[tuple[str, str], dict] = {}
    for role, wanted in job.step["parents"].items():
        task, run = role.split(" ")
        path = results / run / "rm_eval.json" if task == "rm" else results / f"{task}_{run}.json"
        if str(path) not in given:
            raise InputError(f"{path}: not among the inputs of the report; run snakemake again")
        found = manifests.read(path)
        if wanted not in found.stands_for():
            raise InputError(
                f"{path}: not the scores that the report was planned with (fingerprint {found.fingerprint[:12]}, expected "
                f"{wanted[:12]}); run snakemake again"
            )
        scores[task, run] = found.data
    world = World(copy.deepcopy(job.config), scores, {})
    tuned = world.config.get("tune", {}).get("experiments", {})
    for body in tuned.values():
        body["trials"] = dict(body["trials"])  # in a step's JSON a list, in the order of the grid
    for trial in dict.fromkeys(trial for body in tuned.values() for trial in body["trials"]):
        world.trials |= {run: read_run(results, run) for run in world.seeded(trial)}
    apart = set(world.trials) - {run for body in tuned.values() for run in world.seeded(body["of"])}
    for run in dict.fromkeys(run for _, run in scores if run not in apart):
        world.runs[run] = read_run(results, run)
    for run in [*world.runs.values(), *world.trials.values()]:
        if made := world.config["experiments"].get(run.experiment, {}).get("sampled"):
            run.drawn = read_drawn(results, made["answers"] + (f".seed{run.seed}" if run.seed > 1 else ""))
    for task in job.config["tasks"]:
        check_comparable({run: score for (one, run), score in scores.items() if one == task}, task, results)
        alike = [run for run in world.runs if chosen_from(world, run) & {run for one, run in scores if one == task}]
        values = {run: world.values(task, run) for one, run in scores if one == task and run not in alike}
        world.warnings += suspicious(values, task)
    check_decoding(world)
    return world


def chosen_from(world: World, run: str) -> set[str]:
    """The trial whose adapter a tuned run has, judged in the same way: their answers are the same."""
    tuned, view = view_of(run)
    found = world.runs[tuned].manifest.get("selection") if tuned in world.runs else None
    if not found:
        return set()
    trial, dot, seed = found["run"].partition(".")
    return {f"{trial}_{view}{dot}{seed}" if view else found["run"]}


def check_decoding(world: World) -> None:
    """InputError where runs of one family answered under different settings of decoding: by `eval.decoding: folder` a model's own
    folder says them, and an Instruct model's may have a repetition penalty that its base has not."""
    for family in world.config["report"]["families"]:
        task, acted = family["task"], {}
        for experiment in dict.fromkeys([*family.get("runs", []), *family.get("pairs", []), family.get("reference")]):
            for run in world.seeded(experiment) if experiment else []:
                said = _json(world.runs[run].folder / f"{task}_responses.manifest.json")
                found = (world.scores[task, run] | said).get("generation_config")  # in the scores, of a task of `eval.tasks`
                if found is not None:
                    acted[run] = {key: value for key, value in found.items() if key not in NO_SETTING}
        for run, settings in acted.items():
            if settings != (first := next(iter(acted.values()))):
                one = next(iter(acted))
                raise InputError(
                    f"report.families.{family['name']}: {run} answered with {settings or 'greedy decoding alone'}, {one} with "
                    f"{first or 'greedy decoding alone'}: that compares settings of decoding; set eval.decoding: greedy"
                )


def check_comparable(scores: dict[str, dict], task: str, results: Path) -> None:
    """InputError unless all runs answered the same prompts, each once, and each file's mean is that of its verdicts."""
    keys: dict[str, list] = {}
    for run, score in scores.items():
        place = f"{results}/{task}_{run}.json"
        keys[run] = [row["key"] for row in score["per_prompt"]]
        if len(set(keys[run])) < len(keys[run]):
            twice = next(key for key in keys[run] if keys[run].count(key) > 1)
            raise InputError(f"{place}: prompt {twice!r} has two verdicts; delete the file and run snakemake again")
        if len(keys[run]) != score["n_prompts"]:
            raise InputError(
                f"{place}: says {score['n_prompts']} prompts and has {len(keys[run])}; delete it and run snakemake again"
            )
        metric = metric_of(task, score)
        if not all(0 <= value(row) <= 1 for row in score["per_prompt"]):
            raise InputError(f"{place}: has a value outside 0 to 1: altered since it was made; delete it and run snakemake again")
        mean, stated = float(numpy.mean([value(row) for row in score["per_prompt"]])), score[metric]
        if abs(mean - stated) > 1e-9:
            raise InputError(
                f"{place}: {metric} is {stated:.6f}, and its verdicts make {mean:.6f}: altered since it was made; delete "
                "it and run snakemake again"
            )
    first, *others = keys
    for run in others:
        if keys[run] != keys[first]:
            missing = [key for key in keys[first] if key not in set(keys[run])]
            what = (
                f"lacks {len(missing)} of them, such as {missing[0]!r}" if missing else "has them in another order, or has others"
            )
            raise InputError(
                f"{results}/{task}_{run}.json: other prompts than {results}/{task}_{first}.json: it {what}. Scores over "
                "different prompts are never averaged; delete the file and run snakemake again"
            )


def suspicious(verdicts: dict[str, list[float]], task: str) -> list[str]:
    """A warning for each two runs that agree on every prompt while neither passes nearly all or nearly none."""
    found = []
    for one, other in combinations(verdicts, 2):
        share = sum(verdicts[one]) / len(verdicts[one])
        if verdicts[one] == verdicts[other] and 0.02 < share < 0.98 and len(verdicts[one]) >= 20:
            found.append(
                f"{one} and {other} have the same verdict on each of {len(verdicts[one])} prompts ({task}). Two runs do not "
                "agree like that by chance: one of them is probably a copy of the other."
            )
    return found


def read_run(results: Path, name: str) -> Run:
    experiment, _, seed = name.partition(".seed")
    folder = results / name
    run = Run(name, experiment, int(seed or 1), folder, _json(folder / "adapter" / "manifest.json"))
    try:
        run.curves = pandas.read_csv(folder / "adapter" / "metrics.csv")
    except (OSError, ValueError):
        run.curves = None
    files = {"training": "adapter/run.json", "merge": "merged/run.json", "base": "run.json"}
    files |= {f"answers {task}": f"{task}_responses.run.json" for task in (*answered(METRIC), DEVELOPMENT)}
    run.phases = {phase: found for phase, file in files.items() if (found := _json(folder / file)).get("seconds")}
    return run


def read_drawn(results: Path, name: str) -> dict[str, dict]:
    """Of a sampled slice's answers: how many there are, with the seconds and tokens of its run.json; {} where they are gone."""
    made, counts = (_json(results / "data" / f"{name}.answers.{end}.json") for end in ("run", "manifest"))
    return {name: made | {"count": counts["answers"]["sampled"]}} if made.get("seconds") and "answers" in counts else {}


def answers(run: Run, task: str) -> dict[Any, dict]:
    """Key -> answer row of a run; {} where the answers are gone, or a prompt has several."""
    try:
        text = (run.folder / f"{task}_responses.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        return {} if any("sample" in row for row in rows) else {row["key"]: row for row in rows}
    except (OSError, ValueError, KeyError):
        return {}


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
