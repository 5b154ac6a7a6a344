"""What planning costs: seconds and memory of `snakemake -n` for 10, 100 and 1,000 experiments (docs/performance.md).

    python -m tests.support.scale --experiments 10 100 1000 --seeds 5 [--folder FOLDER] [--calls]

Each experiment is a DPO run with settings of its own, on one SFT run for each seed: three jobs for each experiment and seed
(training, answers, scores). Nothing is trained: for the no-op, `finish` writes what the runs would have left, small but valid,
with Snakemake's records. Everything happens in a copy of the repository; every command is the one that a user types.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.conftest import ROOT, Clone, make_clone, warm_snakemake
from workflow_scripts.artifacts import manifests
from workflow_scripts.artifacts.fingerprint import canonical, file_sha256
from workflow_scripts.config import config as configs
from workflow_scripts.plan import records
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plan.records import place_of

NAME = "scale.yaml"
# As many jobs, and nothing else: what Snakemake itself takes.
EMPTY = """
import gc
gc.disable()
rule all:
    default_target: True
    input: [f"scores/{{i}}.json" for i in range({runs})]
    localrule: True
rule train:
    output: "runs/{{run}}/adapter.json"
    shell: "touch {{output}}"
rule generate:
    input: "runs/{{run}}/adapter.json"
    output: "runs/{{run}}/answers.json"
    shell: "touch {{output}}"
rule score:
    input: "runs/{{run}}/answers.json"
    output: "scores/{{run}}.json"
    shell: "touch {{output}}"
"""
COUNT = ("-m", "tests.support.count_calls")  # function calls do not depend on what else the machine does


def write_config(folder: Path, experiments: int, seeds: int) -> None:
    """The tiny world with `experiments` DPO runs and without GSM8K."""
    data = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    del data["eval"]["gsm8k"], data["report"]
    data["seeds"] = list(range(1, seeds + 1))
    kept = {name: data["experiments"][name] for name in ("sft_v2", "dpo")}
    for i in range(1, experiments):
        train = {"beta": round(0.01 * (1 + i % 40), 2), "learning_rate": round(1e-5 * (1 + i // 40), 6)}
        kept[f"dpo_{i:04d}"] = {"extends": "dpo", "train": train}
    data["experiments"] = kept
    (folder / NAME).write_text(yaml.safe_dump(data, sort_keys=False))


def steps_of(plan: Plan) -> list[tuple[str, str]]:
    """Every step of the default target, parents before children."""
    found: dict[str, tuple[str, str]] = {}
    kinds = [("slice", name) for name in plan.config.data["data"]["slices"]] + [("base", "base")]
    for run in ["base", *plan.runs()]:
        kinds += [(kind, run) for kind in ("train", "merge") if run != "base"]
        kinds += [(f"{verb}_{task}", run) for verb in ("generate", "score") for task in plan.config.evaluations]
    by_mark = {plan.fingerprint(*key): key for key in kinds}

    def visit(mark: str) -> None:
        if mark not in found:
            for parent in plan.step(*by_mark[mark])["parents"].values():
                visit(parent)
            found[mark] = by_mark[mark]

    for run in ["base", *plan.runs()]:
        for task in plan.config.evaluations:
            visit(plan.fingerprint(f"score_{task}", run))
    return list(found.values())


def finish(folder: Path) -> int:
    """Lay out everything that the default target makes, with Snakemake's records, as a run would have. Returns how many."""
    with contextlib.chdir(folder):
        plan = Plan(configs.load(NAME))
        keys = steps_of(plan)
        made = {plan.fingerprint(*key): place_of(plan.results, *key).manifest for key in keys}
        for key in keys:
            place, step = place_of(plan.results, *key), plan.step(*key)
            out = Path(place.manifest)
            out.parent.mkdir(parents=True, exist_ok=True)
            files = [Path(file) for file in place.outputs[1:]]
            files += [out.parent / "model.safetensors"] if key[0] == "merge" else []
            for file in files:
                file.write_text(f"{file}\n")
            parents = {role: {"path": made[mark], "fingerprint": mark} for role, mark in step["parents"].items()}
            manifest = {"format": 1, "kind": key[0], "fingerprint": plan.fingerprint(*key), "step": step, "parents": parents}
            out.write_text(manifests.dump(manifest | {"files": {file.name: file_sha256(file) for file in files}}))
            inputs = [one["path"] for one in parents.values()]
            shell = f"python -m workflow_scripts.steps.{step['step']} --step '{canonical(step)}' --inputs {' '.join(inputs)}"
            for output in place.outputs:  # what Snakemake records besides: as long as its own, since it is read again
                file = records.record_file(output)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps({"shellcmd": shell, "input": inputs, "log": [f"logs/{key[1]}/{key[0]}.log"]}))
            records.write(place, step, inputs)
    return len(keys)


def environment(clone: Clone) -> dict[str, str]:
    return clone.environment() | {"PYTHONPATH": f"{clone.folder}:{ROOT}"}


def measure(clone: Clone, *command: str) -> dict:
    """Wall seconds, processor seconds and peak memory of a command; its output."""
    env = environment(clone)
    with tempfile.TemporaryFile("w+") as out:
        started = time.monotonic()
        process = subprocess.Popen(command, cwd=clone.folder, env=env, stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{text[-3000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": seconds,
        "cpu": usage.ru_utime + usage.ru_stime,
        "mb": usage.ru_maxrss * unit / 1e6,
        "text": text,
    }


def seconds(clone: Clone, *args: str) -> dict:
    """What `snakemake -n` with these arguments costs."""
    return measure(clone, "snakemake", "-n", *args)


def calls(clone: Clone, *args: str) -> dict:
    """The same, with the number of function calls; its seconds are those of the profiler."""
    found = measure(clone, sys.executable, *COUNT, "-n", *args)
    return found | {"calls": counted(found["text"])}


def calls_alone(clone: Clone, *args: str) -> dict:
    """The number of calls by a fork that has loaded Snakemake: without those of loading it, which are the same at every size."""
    done = warm_snakemake().run(("python", *COUNT, "-n", *args), clone.folder, environment(clone))
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout + done.stderr
    return {"calls": counted(text), "text": text}


def counted(text: str) -> int:
    return int(re.search(r"^calls (\d+)$", text, flags=re.M)[1])


def empty(folder: Path, runs: int) -> Clone:
    folder.mkdir(parents=True)
    (folder / "Snakefile").write_text(EMPTY.format(runs=runs))
    return Clone(folder)


def costs(folder: Path, experiments: int, seeds: int, cost: Callable = seconds) -> dict[str, dict]:
    """What each kind of planning costs in a new copy of the repository."""
    found = {"empty DAG": cost(empty(folder / "empty", experiments * seeds + seeds + 1))}
    clone = make_clone(folder / "phaseline")
    write_config(clone.folder, experiments, seeds)
    last = "dpo" if experiments == 1 else f"dpo_{experiments - 1:04d}"
    target = f"results/ifeval_{last}{f'.seed{seeds}' if seeds > 1 else ''}.json"
    config = ("--configfile", NAME)
    found |= {
        "one target": cost(clone, target, *config),
        "from nothing": cost(clone, *config),
        "same, --quiet": cost(clone, *config, "--quiet"),
    }
    finish(clone.folder)
    found["no-op"] = cost(clone, *config)
    assert "Nothing to be done" in found["no-op"]["text"], found["no-op"]["text"][-3000:]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=[1000], nargs="+")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the copies are made and kept (default: a temporary folder)")
    parser.add_argument("--calls", action="store_true", help="count function calls too: seconds are then the profiler's")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        top = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        print(f"{'experiments':>11} {'seeds':>5}  {'what':13} {'s':>6} {'cpu s':>6} {'MB':>5}{'   calls' if args.calls else ''}")
        for experiments in args.experiments:
            folder = top / f"{experiments}x{args.seeds}"
            for what, cost in costs(folder, experiments, args.seeds, calls if args.calls else seconds).items():
                line = f"{cost['seconds']:6.1f} {cost['cpu']:6.1f} {cost['mb']:5.0f} {cost.get('calls', '')}"
                print(f"{experiments:11} {args.seeds:5}  {what:13} {line}", flush=True)


if __name__ == "__main__":
    main()
