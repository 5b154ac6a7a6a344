"""What the page shows besides the verdicts: tables and pictures from what lies beside the scores. Descriptive, all of it."""

import math
from collections import Counter
from typing import Any

import numpy

from workflow_scripts.config.names import METRIC, answered, metric_of
from workflow_scripts.report import collect, figures
from workflow_scripts.report.collect import Run, World
from workflow_scripts.report.judge import contrasts
from workflow_scripts.report.trained import NOT_SEEN, UNKNOWN, trained
from workflow_scripts.stats import accuracy

# What is drawn of a training, by the names that TRL and our trainers log: the first that a run has.
CURVES = {
    "loss": ("loss",),
    "margin, chosen over rejected": ("rewards/margins", "margin"),
    "reward": ("reward",),
    "KL to the reference": ("kl",),
    "length of answers, tokens": ("completions/mean_length",),
    "gradient norm": ("grad_norm",),
}
VIEWER_BYTES = 2_500_000  # for answers: the page has to be mailed
LONGEST = 1_200  # characters of an answer that are shown


def percent(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def scores(world: World) -> list[dict]:
    """A row for each experiment: mean over its seeds of each task with its standard error, and seed by seed."""
    rows = []
    for name in models(world):
        runs = list(dict.fromkeys(world.seeded(name)))
        row: dict[str, Any] = {"name": name, "tasks": {}, "mc2": None}
        for task in world.config["tasks"]:
            values = [world.scores[task, run][metric_of(task, world.scores[task, run])] for run in runs]
            clusters = [world.clusters(task, run) for run in runs]
            row["tasks"][task] = {"mean": mean_and_error(clusters), "each": ", ".join(map(percent, values))}
        if "truthfulqa" in world.config["tasks"]:
            row["mc2"] = mean_and_error([[[one["mc2"]] for one in world.scores["truthfulqa", run]["per_prompt"]] for run in runs])
        followed = [[instructions(row) for row in world.scores["ifeval", run]["per_prompt"]] for run in runs]
        loose = [world.scores["ifeval", run]["prompt_level_loose_acc"] for run in runs]
        rows.append(row | {"loose": percent(float(numpy.mean(loose))), "instructions": mean_and_error(followed)})
    return rows


def instructions(row: dict) -> list[bool]:
    """The strict verdicts on a prompt's instructions, of all its answers."""
    found = row["follow_instruction_list_strict"]
    return [flag for answer in found for flag in answer] if "value" in row else found


def mean_and_error(runs: list) -> str:
    """Percent, +- one standard error over prompts and, with several runs, seeds."""
    found = accuracy.of_arm(runs)
    return percent(found.mean) + (f" +- {100 * found.stderr:.1f}" if found.stderr is not None else "")


def models(world: World) -> list[str]:
    """What has answers: the models that were not trained here, and every experiment that is no reward model."""
    others = world.config.get("models", [])
    return ["base", *others, *(name for name, body in world.config["experiments"].items() if body["method"] != "rm")]


def training(world: World) -> list[dict]:
    """For every experiment that trains: its own objective on held-out rows, seed by seed (report/trained.py)."""
    found: dict[str, list[dict]] = {}
    for run in world.runs.values():
        if "objective" in run.manifest:
            found.setdefault(run.experiment, []).append({"run": run.name, **trained(run.manifest)})
    rows = []
    for name, runs in found.items():
        verdicts = [run["trained"] for run in runs]
        values = [
            {
                "name": value["name"],
                "before": numpy.mean([run["values"][i]["before"] for run in runs]),
                "after": numpy.mean([run["values"][i]["after"] for run in runs]),
            }
            for i, value in enumerate(runs[0]["values"])
        ]
        rows.append(
            {
                "name": name,
                "method": runs[0]["method"],
                "runs": runs,
                "values": values,
                "moved": sum(verdict is True for verdict in verdicts),
                "verdict": _of_seeds([run["verdict"] for run in runs], verdicts),
            }
        )
    return rows


def _of_seeds(verdicts: list[str], moved: list[bool | None]) -> str:
    if len(set(verdicts)) == 1:
        return verdicts[0]
    return UNKNOWN if None in moved else "not in every seed" if any(moved) else NOT_SEEN


def kinds(world: World) -> dict:
    """IFEval by instruction kind: strict accuracy, mean over seeds, for each experiment."""
    names = models(world)
    first = world.scores["ifeval", "base"]["by_instruction"]
    rows = []
    for kind in sorted(first):
        values = [
            float(numpy.mean([world.scores["ifeval", run]["by_instruction"][kind]["strict_acc"] for run in world.seeded(name)]))
            for name in names
        ]
        cells = [{"text": f"{100 * value:.0f}", "shade": figures.shade(value, 0.0, 1.0)} for value in values]
        rows.append({"kind": kind, "n": first[kind]["n"], "cells": cells})
    return {"names": names, "rows": rows}


def lengths(world: World) -> list[dict]:
    """Length by experiment, share cut off at the limit, and accuracy among the answers that ended. Of tasks with answers."""
    rows = []
    for name in models(world):
        for task in answered(world.config["tasks"]):
            tokens, cut, ended = [], [], []
            for run in dict.fromkeys(world.seeded(name)):
                score, given = world.scores[task, run], collect.answers(world.runs[run], task)
                tokens.append(score.get("mean_response_tokens"))
                cut.append(score.get("truncated_share"))
                passed = [
                    collect.value(row) for row in score["per_prompt"] if given.get(row["key"], {}).get("finish_reason") == "stop"
                ]
                ended += [float(numpy.mean(passed))] if passed else []
            known = [value for value in tokens if value is not None]
            rows.append(
                {
                    "name": name,
                    "task": task,
                    "tokens": f"{numpy.mean(known):.0f}" if known else "",
                    "cut": percent(float(numpy.mean([c for c in cut if c is not None])))
                    if any(c is not None for c in cut)
                    else "",
                    "ended": percent(float(numpy.mean(ended))) if ended else "",
                }
            )
    return rows


def curves(world: World) -> str:
    """Training curves, a thin line for each seed. "" where no run has any."""
    panels: dict[str, dict[str, list]] = {}
    for what, columns in CURVES.items():
        for run in world.runs.values():
            found = next((column for column in columns if run.curves is not None and column in run.curves), None)
            if found is not None and run.curves is not None and "step" in run.curves:
                line = run.curves[["step", found]].dropna()
                if len(line) > 1:
                    lines = panels.setdefault(what, {}).setdefault(run.experiment, [])
                    lines.append((line["step"].tolist(), line[found].tolist()))
    return figures.curves(panels, "training curves: " + ", ".join(panels)) if panels else ""


def rewards(world: World) -> str:
    """Reward at the end of training against IFEval, for methods with a reward. "" where there are none."""
    points = []
    for run in world.runs.values():
        after = run.manifest.get("objective", {}).get("after", {})
        if "reward" in after and ("ifeval", run.name) in world.scores:
            score = 100 * world.scores["ifeval", run.name][METRIC["ifeval"]]
            points.append({"x": after["reward"], "y": score, "name": run.experiment})
    if not points:
        return ""
    return figures.scatter(points, "held-out reward after training", "IFEval, prompt strict, %", "reward against IFEval")


def budgets(world: World) -> list[dict]:
    """What each experiment's training was given, mean over its seeds.

    rows: of its slice (pairs, conversations, prompts); batch: of a step; tokens: as its trainer counts them, sampled answers too.
    A tuned one was given what all its trials were: steps, tokens, answers and seconds are their sums. drawn: answers that its
    rows were chosen from, which experiments may share, with their tokens and the seconds that they took.
    """
    rows = []
    tuned = world.config.get("tune", {}).get("experiments", {})
    for name, body in world.config["experiments"].items():
        trials = tuned.get(name, {}).get("trials", [name])
        runs = world.trials if name in tuned else world.runs
        made = [run for run in runs.values() if run.experiment in trials and "training" in run.phases]
        trained = [_given(run) for run in made]
        if not trained:
            continue
        row = {"name": name, "method": body["method"], "slice": body["slice"], "trials": len(trials)}
        for what in ("rows", "steps", "batch", "tokens", "sampled", "seconds"):
            known = [gpu_seconds(facts) if what == "seconds" else facts[what] for facts in trained if facts.get(what) is not None]
            times = 1 if what in ("rows", "batch") else len(trials)
            row[what] = f"{times * numpy.mean(known):,.0f}" if known else ""
        drawn = [facts for run in runs.values() if run.experiment in trials for facts in run.drawn.values()]
        row["drawn"] = f"{numpy.mean([facts['count'] for facts in drawn]):,.0f}" if drawn else ""
        row["drawn_tokens"] = f"{numpy.mean([facts.get('tokens', 0) for facts in drawn]):,.0f}" if drawn else ""
        row["drawn_seconds"] = f"{numpy.mean([gpu_seconds(facts) for facts in drawn]):,.0f}" if drawn else ""
        rows.append(row)
    return rows


def _given(run: Run) -> dict:
    """What a training's run.json says, with what follows from its settings: the batch of a step, the answers sampled."""
    facts, train = run.phases["training"], run.manifest.get("step", {}).get("config", {}).get("train", {})
    size = train.get("per_device_train_batch_size")
    batch = size and size * train.get("gradient_accumulation_steps", 1)
    samples = batch and "max_completion_length" in train and facts.get("steps") is not None
    return facts | {"batch": batch, "sampled": facts["steps"] * batch / train.get("num_iterations", 1) if samples else None}


def gpu_seconds(facts: dict) -> float:
    """A phase's own seconds of the card: a second that it shared with two others is a third of one."""
    return facts.get("gpu_seconds", facts["seconds"])


def costs(world: World) -> list[dict]:
    """Time, memory and money by experiment, over its seeds: its own phases, not those that it starts from."""
    price, currency = world.config["report"].get("price"), world.config["report"].get("currency", "")
    rows = []
    by_experiment: dict[str, list[Run]] = {}
    for run in world.runs.values():
        by_experiment.setdefault(run.experiment, []).append(run)
    for name, body in world.config.get("tune", {}).get("experiments", {}).items():  # the experiment itself has its own row
        by_experiment[name] += [
            run for run in world.trials.values() if run.experiment in body["trials"] and run.name not in world.runs
        ]
    for name, runs in by_experiment.items():
        seconds: Counter = Counter()
        memory = on_gpu = 0.0
        for run in runs:
            for phase, facts in run.phases.items():
                seconds[phase.split(" ")[0]] += facts["seconds"]
                on_gpu += gpu_seconds(facts) if phase.split(" ")[0] in ("training", "answers") else 0
                memory = max(memory, facts.get("gpu_peak_memory_bytes") or facts.get("peak_memory_bytes") or 0)
        hours = on_gpu / 3600 if world.config["device"] == "cuda" else None
        rows.append(
            {
                "name": name,
                "runs": len(runs),
                "training": _time(seconds["training"]),
                "answers": _time(seconds["answers"]),
                "other": _time(sum(value for phase, value in seconds.items() if phase not in ("training", "answers"))),
                "memory": f"{memory / 2**30:.2f}" if memory else "",
                "gpu_hours": f"{hours:.2f}" if hours is not None else "",
                "money": f"{hours * price:.2f} {currency}" if hours is not None and price is not None else "",
            }
        )
    return rows + _drawn_costs(world, price, currency)


def _drawn_costs(world: World, price: float | None, currency: str) -> list[dict]:
    """Of answers that slices were chosen from: rows of their own, since several experiments may have been trained on them."""
    found: dict[str, dict[str, dict]] = {}
    for run in [*world.runs.values(), *world.trials.values()]:
        for name, facts in run.drawn.items():
            found.setdefault(name.partition(".")[0], {})[name] = facts
    rows = []
    for name, some in found.items():
        memory = max(facts.get("gpu_peak_memory_bytes") or facts.get("peak_memory_bytes") or 0 for facts in some.values())
        hours = sum(map(gpu_seconds, some.values())) / 3600 if world.config["device"] == "cuda" else None
        rows.append(
            {"name": f"answers of {name}", "runs": len(some), "training": "", "other": ""}
            | {"answers": _time(sum(facts["seconds"] for facts in some.values()))}
            | {"memory": f"{memory / 2**30:.2f}" if memory else "", "gpu_hours": f"{hours:.2f}" if hours is not None else ""}
            | {"money": f"{hours * price:.2f} {currency}" if hours is not None and price is not None else ""}
        )
    return rows


def _time(seconds: float) -> str:
    return "" if not seconds else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def tree(world: World) -> list[dict]:
    """The experiments as they start from each other, depth first: name, depth, method, and what of it there is."""
    experiments, tuned = world.config["experiments"], world.config.get("tune", {}).get("experiments", {})
    children: dict[str, list[str]] = {}
    for name, body in experiments.items():
        children.setdefault(body.get("start_from", "base"), []).append(name)
    rows: list[dict] = []

    def visit(name: str, depth: int) -> None:
        runs = [run for run in world.runs.values() if run.experiment == name]
        there = {"trained": "adapter/manifest.json", "merged": "merged/manifest.json", "answered": "ifeval_responses.jsonl"}
        counts = {what: sum((run.folder / file).exists() for run in runs) for what, file in there.items()}
        state = [f"{count} {what}" for what, count in counts.items() if count]
        body = experiments.get(name, {"method": "base model" if name == "base" else "only scored"})
        reward = body.get("reward")
        rows.append(
            {
                "name": name,
                "depth": depth,
                "method": body["method"]
                + (f", reward {reward}" if reward else "")
                + (f", {body['view']}" if "view" in body else "")
                + (f", the best of {len(tuned[name]['trials'])} trials" if name in tuned else ""),
                "state": ", ".join([*state, f"{len(runs)} scored"]),
            }
        )
        for child in children.get(name, []):
            visit(child, depth + 1)

    for model in ("base", *world.config.get("models", [])):
        visit(model, 0)
    return rows


def viewer(world: World) -> dict:
    """Prompts whose verdict flips between two runs of the first seed, with both answers. Cut to a budget, most disputed first.

    Of tasks with one answer to a prompt: a choice between options has no text to show, and of several none stands for all.
    """
    tasks = [task for task in answered(world.config["tasks"]) if world.samples(task) == 1]
    families = [family for family in world.config["report"]["families"] if family["task"] in tasks]
    pairs = list(dict.fromkeys((family["task"], *pair) for family in families for pair in contrasts(family)))
    seed = world.seeds[0]
    texts: dict[str, dict] = {task: {} for task in tasks}
    passed: dict[str, dict[str, dict]] = {task: {} for task in texts}
    given: dict[str, dict[str, dict]] = {task: {} for task in texts}
    disputed: Counter = Counter()
    for task, *names in pairs:
        for name in names:
            if name not in passed[task]:
                run = world.seeded(name, [seed])[0]
                given[task][name] = collect.answers(world.runs[run], task)
                passed[task][name] = {row["key"]: collect.value(row) for row in world.scores[task, run]["per_prompt"]}
        after, before = names
        disputed.update((task, key) for key, value in passed[task][after].items() if value != passed[task][before][key])
    shown: dict[str, dict] = {task: {name: {} for name in passed[task]} for task in texts}
    size, kept = 0, 0
    for (task, key), _ in sorted(disputed.items(), key=lambda item: (-item[1], str(item[0]))):
        rows = {name: rows[key] for name, rows in given[task].items() if key in rows}
        if len(rows) < len(given[task]):
            continue
        prompt = next(iter(rows.values()))["prompt"]
        size += len(prompt) + sum(min(len(row["response"]), LONGEST) + 20 for row in rows.values())
        if size > VIEWER_BYTES:
            break
        kept += 1
        texts[task][str(key)] = prompt[:LONGEST]
        for name, row in rows.items():
            shown[task][name][str(key)] = [int(passed[task][name][key]), row["response"][:LONGEST]]
    return {"pairs": [list(pair) for pair in pairs], "prompts": texts, "answers": shown, "kept": kept, "flipped": len(disputed)}
