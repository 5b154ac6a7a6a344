"""A results folder as a finished comparison leaves it, without training: verdicts drawn from given accuracies, answers."""

import contextlib
import json
from pathlib import Path

import numpy
import yaml

from tests.conftest import ROOT
from workflow_scripts.artifacts.manifests import Job
from workflow_scripts.config import comparison
from workflow_scripts.config import config as configs
from workflow_scripts.config.names import CHOICE
from workflow_scripts.config.written import merge
from workflow_scripts.plan.plan import Plan
from workflow_scripts.stats import selection
from workflow_scripts.steps import cli, select

KINDS = ["punctuation:no_comma", "change_case:english_lowercase", "startend:quotation"]
ACCURACY = {
    "base": 0.2,
    "sft_v2": 0.35,
    "sft_v2_merged": 0.35,
    "dpo": 0.7,
    "kto": 0.7,
    "ppo": 0.37,
    "grpo": 0.6,
    "rloo": 0.6,
    "dpo_flipped": 0.2,
}
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><b>=1+1</b>"


def write_config(folder: Path, seeds: int = 3, more: int = 0, overlay: dict | None = None) -> Path:
    """The tiny world's config with these seeds and `more` experiments, as one file."""
    data = merge(yaml.safe_load((ROOT / "config/config.yaml").read_text()), overlay or {})
    data["seeds"] = list(range(1, seeds + 1))
    for i in range(more):
        data["experiments"][f"dpo_{i:03d}"] = {"extends": "dpo", "train": {"beta": round(0.1 + 0.001 * i, 4)}}
    path = folder / "world.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def make(folder: Path, config: Path, accuracy: dict[str, float] | None = None, seed_sd: float = 0.01, prompts: int = 200) -> Plan:
    """Score files and what lies beside them, for every run that the report reads. Accuracy of unknown experiments: 0.5."""
    rng = numpy.random.default_rng(0)
    known = ACCURACY | (accuracy or {})
    difficulty = rng.normal(0, 1.2, prompts)
    with contextlib.chdir(folder):
        plan = Plan(configs.load(config))
        for run in comparison.runs(plan.config):
            experiment = run.partition(".")[0]
            for task in plan.config.scored:
                share = numpy.clip(
                    known.get(experiment, 0.5) + (0 if run in plan.config.models else rng.normal(0, seed_sd)), 0.01, 0.99
                )
                passes = rng.random(prompts) < 1 / (1 + numpy.exp(-(1.6 * numpy.log(share / (1 - share)) + difficulty)))
                _score(plan, task, run, passes)
            if run not in plan.config.models and not plan.config.view(run)[1]:
                body = plan.config.experiments[experiment]
                own = {key: body[key] for key in ("flip_labels", "placebo") if key in body}
                _adapter(plan, run, rng, body["method"], experiment != "dpo_ipo", own)
        for task, run in plan.trial_scores():
            share = numpy.clip(known.get(run.partition(".")[0], 0.5) + rng.normal(0, seed_sd), 0.01, 0.99)
            _score(plan, task, run, rng.random(prompts) < share)
        for run in [run for run in plan.runs() if plan.tuned(run) is not None or plan.config.run(run)[0] in plan.config.trials]:
            _adapter(plan, run, rng, plan.experiment(run)["method"])
        for run in [run for run in plan.runs() if plan.development_scores(run)]:
            _choose(plan, run)
        for run in comparison.reward_models(plan.config):
            _adapter(plan, run, rng, "rm")
            _write(Path(f"{plan.results}/{run}/rm_eval.json"), {"fingerprint": plan.fingerprint("eval_rm", run), "files": {}})
    return plan


def _score(plan: Plan, task: str, run: str, passes: numpy.ndarray) -> None:
    if task == "judge":  # whoever passes more is liked more
        rows = [{"key": i, "reward": float(ok)} for i, ok in enumerate(passes)]
        facts = {
            "n_prompts": len(rows),
            "mean_reward": float(numpy.mean(passes)),
            "mean_response_tokens": 20.0,
            "per_prompt": rows,
        }
        _write(
            Path(f"{plan.results}/judge_{run}.json"), {"fingerprint": plan.fingerprint("score_judge", run), "files": {}} | facts
        )
        return
    rows = [
        {"key": i, "correct": bool(ok)}
        if task != "ifeval"
        else {"key": i, "follow_instruction_list_strict": [bool(ok)], "follow_instruction_list_loose": [bool(ok)]}
        for i, ok in enumerate(passes)
    ]
    mean = float(numpy.mean(passes))
    score = {"fingerprint": plan.fingerprint(f"score_{task}", run), "files": {}, "n_prompts": len(rows), "per_prompt": rows}
    if task in plan.config.own_tasks:
        name = plan.config.own_tasks[task]["metric"].partition(",")[0]
        _write(Path(f"{plan.results}/{task}_{run}.json"), score | {"metric": name, name: mean, f"{name}_stderr": 0.03})
        return
    if task in CHOICE:
        if task == "truthfulqa":
            score |= {"mc2": 0.5, "per_prompt": [row | {"mc2": 0.5} for row in rows]}
        _write(Path(f"{plan.results}/{task}_{run}.json"), score | {"acc": mean, "acc_stderr": 0.03, "tied": 0, "cut": 0})
        return
    score |= {"mean_response_tokens": 23.0, "truncated_share": 0.01}
    if task == "gsm8k":
        score |= {"exact_match": mean}
    else:
        score |= {"prompt_level_strict_acc": mean, "prompt_level_loose_acc": mean, "inst_level_strict_acc": mean}
        score["by_instruction"] = {
            kind: {"n": len(rows) // 3, "strict_acc": float(numpy.mean(passes[i::3]))} for i, kind in enumerate(KINDS)
        }
    _write(Path(f"{plan.results}/{task}_{run}.json"), score)
    answers = [
        {
            "key": i,
            "prompt": f"Write about topic {i}. {HOSTILE if i == 0 else ''}",
            "response": f"{run} on {i}. {HOSTILE if i % 7 == 0 else ''}",
        }
        | {"tokens": 23, "finish_reason": "stop"}
        for i in range(len(rows))
    ]
    file = Path(f"{plan.results}/{run}/{task}_responses.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in answers))
    _write(file.with_name(f"{task}_responses.run.json"), {"seconds": 12.5, "peak_memory_bytes": 6e8})


def _adapter(
    plan: Plan, run: str, rng: numpy.random.Generator, method: str, trains: bool = True, own: dict | None = None
) -> None:
    folder = Path(f"{plan.results}/{run}/adapter")
    values = {"sft": ["loss"], "ppo": ["reward"], "grpo": ["reward"], "rloo": ["reward"]}.get(method, ["accuracy", "margin"])
    moved = {value: (-0.2 if value == "loss" else 0.4) * (1 if trains else 0.01) for value in values}
    if "flip_labels" in (own or {}):
        moved["margin"] *= -1
    objective = {
        "before": dict.fromkeys(values, 0.5),
        "after": {value: 0.5 + change for value, change in moved.items()},
        "change": {value: {"mean": change, "stderr": 0.02, "n": 20} for value, change in moved.items()},
    }
    manifest = {"fingerprint": plan.fingerprint("train", run), "files": {}, "objective": objective}
    rank = plan.config.lora(run.partition(".")[0])["r"]
    manifest["constant"] = {"trainable_parameters": 9_728 * rank}  # inputs and outputs of all matrices of the tiny model
    told = {"method": method, "train": plan.config.experiments[run.partition(".")[0]]["train"]} | (own or {})
    _write(folder / "manifest.json", manifest | {"step": {"config": told}})
    facts = {"seconds": 33.0, "rows": 300, "steps": 19, "tokens": 12_000 + 300 * plan.config.run(run)[1]}
    _write(folder / "run.json", facts | {"peak_memory_bytes": 9e8, "gpu_peak_memory_bytes": 3 * 2**30})
    steps = numpy.arange(1, 61)
    curve = 0.7 - 0.005 * steps + rng.normal(0, 0.01, 60)
    lines = [f"{step},{loss:.4f},{0.4:.2f}" for step, loss in zip(steps, curve, strict=True)]
    (folder / "metrics.csv").write_text("step,loss,grad_norm\n" + "\n".join(lines) + "\n")


def _choose(plan: Plan, run: str) -> None:
    """What the choice among trials adds to the manifest of an adapter."""
    config = plan.step("train", run)["config"]
    file = f"{plan.results}/dev_{{}}.json"
    runs = [
        [[float(row["correct"]) for row in _read(Path(file.format(one)))["per_prompt"]] for one in trial["judged"]]
        for trial in config["trials"]
    ]
    scores = [selection.of_prompts(one) for one in runs]
    place = Path(f"{plan.results}/{run}/adapter/manifest.json")
    _write(place, _read(place) | {"selection": select.selected(config["trials"], "prompt_level_strict_acc", scores, runs)})


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


def _write(path: Path, data: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))  # not as steps write it: with line breaks Python's encoder takes ten times as long


def compare(folder: Path) -> None:
    """The tiny world's comparison and its page, for tests that only read them."""
    folder.mkdir()
    report(folder, make(folder, write_config(folder)))


def plan_of(folder: Path) -> Plan:
    with contextlib.chdir(folder):
        return Plan(configs.load(folder / "world.yaml"))


def page_of(folder: Path) -> str:
    return (folder / "results/report/comparison.html").read_text(encoding="utf-8")


def job(plan: Plan) -> Job:
    """The report's step, as its rule would start it in the folder."""
    inputs = [Path(file) for file in plan.report_inputs()]
    step = cli.read_step(plan.report())
    return Job(step, inputs, Path(f"{plan.results}/report/manifest.json"), Path(plan.work))


def report(folder: Path, plan: Plan) -> str:
    """The page of the folder, made by the step itself."""
    from workflow_scripts.steps import report as step

    with contextlib.chdir(folder):
        step.main(job(plan))
        return Path(f"{plan.results}/report/comparison.html").read_text(encoding="utf-8")
