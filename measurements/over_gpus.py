"""Measures one training over several GPUs against the same on one: seconds of its steps, of all of it, and how losses differ.

    python -m measurements.over_gpus --out over.json --folder /tmp/over --gpus 1 2                  on a host with two GPUs
    python -m measurements.over_gpus --out over7b.json --folder /tmp/over --shape 7b --parts shard  7 B, whole and in parts
    python -m measurements.over_gpus --out memory.json --folder /tmp/over --parts memory --memory-gb 40
    python -m measurements.over_gpus --out trial.json --folder /tmp/over --tiny --steps 2           on a CPU: that it runs

The study's shape (Qwen2.5-0.5B), or Qwen2.5-7B's, with random weights made on the card; by the steps' own commands, rows as in
measurements/training.py. The effective batch is `--batch`, in micro-batches of `--micro`, so that cards share several of them.

    whole    each phase as its config has it, on each number of GPUs: every card has all of the base
    shard    in full precision, on the last number of GPUs: the base whole on each card, and in parts (`shard: true`)
    answers  greedy answers of the base to `--prompts` prompts, `--new` tokens each: by one job, and by one on each GPU, as with
             `eval.shards`; and with 16 prompts, to tell the start from the answering: `answering_s` is without it
    memory   DPO on a base in bf16, rows that fill `--length` tokens, each card limited to `--memory-gb`: micro-batches are made
             larger until one limited card has no room for them; then the same on all cards in parts

`efficiency` is the median time of a step on the first number of GPUs over that on N, by N; `steps_efficiency` the same of all
steps, with what the first waits for, and `whole_efficiency` of all of the job, with loading, the reference and the held-out
objective. `apart` is the largest difference of two losses of one step.
Results are written after each run. A run that fails, or takes longer than `--limit-s`, is a line with its reason; `--budget-s`
bounds all of it. At 7 B: `--shape 7b --batch 32 --micro 8 --steps 4 --prompts 256 --new 256`.
"""

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas

from measurements import study_memory
from measurements.training import job_of, lengths, rows
from tests.support import small_steps

SPEED = {"unpadded": True, "dequantised": True, "fused": True, "compiled": 0, "captured": True}


class Runs:
    """Runs of trainings, noted as they end."""

    def __init__(self, given: argparse.Namespace):
        self.given, self.folder, self.end = given, given.folder / given.shape, time.monotonic() + given.budget_s
        # In a process of its own, which takes what it has of the first card along.
        about = subprocess.run([sys.executable, "-m", "measurements.over_gpus", *sys.argv[1:], "--prepare"], capture_output=True)
        if about.returncode:
            raise SystemExit(about.stderr.decode(errors="replace"))
        self.found: dict[str, Any] = {"machine": json.loads(about.stdout.splitlines()[-1]), "shape": given.shape, "runs": []}

    def note(self, one: dict) -> dict:
        self.found["runs"].append(one)
        print("RESULT", json.dumps({key: value for key, value in one.items() if key != "loss"}), flush=True)
        self.given.out.write_text(json.dumps(self.found, indent=1) + "\n")
        return one

    def configured(self, length: int, name: str = "", quantise: str = "") -> Any:
        config = study_memory.configured(self.given.shape, self.given.tiny, length)
        if quantise:
            config.experiments[name]["quantise"] = quantise
        return config

    def train(self, name: str, config: Any, slices: dict, gpus: int, train: dict, shard: bool = False, gb: float = 0) -> dict:
        """One training. gb: what each card may have of its memory."""
        body = dict(config.experiments[name])
        settings = dict(body["train"]) | {"max_steps": self.given.steps, "logging_steps": 1} | train
        about = {"phase": name, "quantise": body["quantise"], "gpus": gpus, "shard": shard}
        about |= {"micro": settings["per_device_train_batch_size"]} | ({"limit_gb": gb} if gb else {})
        place = " ".join(f"{key}-{value}" for key, value in about.items())
        job = job_of(name, settings, config, self.folder, slices, place)
        shutil.rmtree(job.out.parent, ignore_errors=True)  # or it would be taken over
        module = "measurements.limited" if gb else f"workflow_scripts.steps.{job.step['step']}"
        command = [sys.executable, "-m", module, "--step", json.dumps(job.step), "--speed", json.dumps(SPEED)]
        command += ["--inputs", *map(str, job.inputs), "--out", str(job.out), "--work", str(job.work), "--gpus", str(gpus)]
        command += ["--shard"] if shard else []
        return about | self.timed(command, job.out.parent, {"LIMITED_GB": str(gb), "LIMITED_STEP": job.step["step"]})

    def ran(self, command: list[str], more: dict[str, str]) -> dict:
        """Run a command: `whole_s`, and `error` where it failed."""
        began = time.monotonic()
        seconds = min(self.given.limit_s, self.end - began)
        if seconds < 20:
            return {"error": "not begun: the time for all runs is up"}
        try:
            done = subprocess.run(command, capture_output=True, env=os.environ | more, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {seconds:.0f} s"}
        seconds = round(time.monotonic() - began, 1)
        if done.returncode:
            said = done.stderr.decode(errors="replace")
            print(said[-3000:], flush=True)
            return {"error": (said.strip().splitlines() or ["nothing said"])[-1][-400:], "whole_s": seconds}
        return {"whole_s": seconds}

    def timed(self, command: list[str], folder: Path, more: dict[str, str]) -> dict:
        found = self.ran(command, more)
        if "error" in found:
            return found
        info = json.loads((folder / "run.json").read_text())
        curve = pandas.read_csv(folder / "metrics.csv")["loss"].dropna().tolist()
        steps = info["timing"]["train_runtime"]
        found |= {
            "steps": info["steps"],
            "steps_s": round(steps, 2),
            "step_s": info["timing"]["step_seconds_median"],
            "loss": curve,
        }
        found |= {"tokens_per_s": info["tokens"] and round(info["tokens"] / steps)}
        return found | {"peak_gib": round(info.get("gpu_peak_memory_bytes", 0) / 2**30, 2)}

    def held_against(self, first: dict, one: dict) -> None:
        """Note what one run took, beside the first."""
        if first is not one and "error" not in first and "error" not in one:
            more = one["gpus"] / first["gpus"]
            one["efficiency"] = round(first["step_s"] / one["step_s"] / more, 3)
            one["steps_efficiency"] = round(first["steps_s"] / one["steps_s"] / more, 3)
            one["whole_efficiency"] = round(first["whole_s"] / one["whole_s"] / more, 3)
            one["apart"] = max(abs(a - b) for a, b in zip(first["loss"], one["loss"], strict=True))
        self.note(one)

    def batches(self, name: str) -> dict:
        given = self.given
        train: dict = {"per_device_train_batch_size": given.micro, "gradient_accumulation_steps": given.batch // given.micro}
        train["gradient_checkpointing"] = given.shape == "7b"
        rollouts = name in ("grpo", "rloo")
        return train | ({"steps_per_generation": given.batch // given.micro} if rollouts else {})


def whole(runs: Runs) -> None:
    given = runs.given
    config = runs.configured(given.length)
    slices = rows(config, runs.folder, given.batch * given.steps + 40)
    for name in given.phases:
        first: dict = {}
        for gpus in given.gpus:
            one = runs.train(name, config, slices, gpus, runs.batches(name))
            first = first or one
            runs.held_against(first, one)


def shard(runs: Runs) -> None:
    given = runs.given
    slices = rows(runs.configured(given.length), runs.folder, given.batch * given.steps + 40)
    for name in given.sharded:
        config, first = runs.configured(given.length, name, "none"), {}
        for gpus, parts in ((given.gpus[0], False), (given.gpus[-1], False), (given.gpus[-1], True)):
            one = runs.train(name, config, slices, gpus, runs.batches(name), parts)
            first = first or one
            runs.held_against(first, one)


def answers(runs: Runs) -> None:
    given = runs.given
    config, times = runs.configured(given.length), dict[int, dict]()
    for gpus, count in ((1, 16), (1, given.prompts), (given.gpus[-1], given.prompts)):
        one: dict[str, Any] = {"phase": "answers", "gpus": gpus, "prompts": count}
        folder = runs.folder / f"answers {gpus} {count}"
        shutil.rmtree(folder, ignore_errors=True)
        texts = [f"{i} {'three ' * (length // 4)}" for i, length in enumerate(lengths(count, 256))]
        rows = small_steps.write_slice(folder, "ifeval", [{"key": i, "prompt": text} for i, text in enumerate(texts)], 0)
        settings = {"max_new_tokens": given.new, "decoding": "greedy", "generation": config.generation()}
        parents = {"start": runs.folder / "base/manifest.json", "prompts": rows}
        job = small_steps.job("generate", folder / "ifeval_responses.manifest.json", parents, settings)
        job.step |= {key: config.data[key] for key in ("device", "threads")} | {"precision": config.data["eval"]["precision"]}

        def command(step: dict, out: Path, *more: Path, job: Any = job) -> list[str]:
            words = [sys.executable, "-m", "workflow_scripts.steps.generate", "--step", json.dumps(step), "--out", str(out)]
            return [*words, "--work", str(job.work), "--inputs", *map(str, [*job.inputs, *more])]

        began, shards = time.monotonic(), [folder / f"ifeval_shards/{k}of{gpus}.json" for k in range(1, gpus + 1)]
        if gpus == 1:
            found = runs.ran(command(job.step, job.out), {})
        else:
            parts = [command(job.step | {"shard": [k, gpus]}, out) for k, out in enumerate(shards, 1)]
            with ThreadPoolExecutor() as pool:
                found = next((one for one in pool.map(lambda part: runs.ran(part, {}), parts) if "error" in one), {})
            found = found or runs.ran([*command(job.step, job.out, *shards), "--gpus", "0"], {})
        one |= found | {"whole_s": round(time.monotonic() - began, 1)}
        if "error" not in one:
            one["said"] = [json.loads(line)["response"] for line in (folder / "ifeval_responses.jsonl").read_text().splitlines()]
            times[len(times)] = one
        if len(times) > 1 and one is not times[0]:
            one["answering_s"] = round(one["whole_s"] - times[0]["whole_s"], 1)
            one["tokens_per_s"] = round((count - 16) * given.new / max(one["answering_s"], 0.1))
        if len(times) == 3:
            one["efficiency"] = round(times[1]["answering_s"] / max(one["answering_s"], 0.1) / gpus, 3)
            one["whole_efficiency"] = round(times[1]["whole_s"] / one["whole_s"] / gpus, 3)
            one["equal"] = sum(a == b for a, b in zip(times[1]["said"], one["said"], strict=True)) / count
        runs.note({key: value for key, value in one.items() if key != "said"})


def memory(runs: Runs) -> None:
    given = copy.copy(runs.given)
    given.length = given.memory_length
    config = runs.configured(given.length, "dpo", "none")
    slices = study_memory.slices(config, runs.folder)
    for micro in given.micros:
        train = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}
        train |= {"max_steps": 3, "max_length": given.length, "per_device_eval_batch_size": 1}
        one = runs.note(runs.train("dpo", config, slices, 1, train, gb=given.memory_gb))
        if "error" not in one:
            continue  # it has room on one card
        one = runs.note(runs.train("dpo", config, slices, given.gpus[-1], train, shard=True, gb=given.memory_gb))
        if "error" not in one:
            return


PARTS = {"whole": whole, "shard": shard, "answers": answers, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for the base and what is trained; a base there is taken")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU, to see that it runs")
    parser.add_argument("--shape", choices=["05b", "7b"], default="05b")
    parser.add_argument("--parts", nargs="+", default=["whole", "shard"], choices=[*PARTS])
    parser.add_argument("--phases", nargs="+", default=["sft_v2", "dpo", "kto", "grpo"], help="of the part `whole`")
    parser.add_argument("--sharded", nargs="+", default=["dpo", "sft_v2"], help="phases of the part `shard`")
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2], help="the first is what the others are held against")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=128, help="rows of a step")
    parser.add_argument("--micro", type=int, default=16, help="rows of a micro-batch")
    parser.add_argument("--length", type=int, help="tokens of the longest row (default 1024; with --tiny 64)")
    parser.add_argument("--prompts", type=int, default=2048, help="of the part `answers`")
    parser.add_argument("--new", type=int, default=512, help="of the part `answers`: tokens of each")
    parser.add_argument("--memory-gb", type=float, default=40.0, help="of the part `memory`: what each card has")
    parser.add_argument("--memory-length", type=int, default=4096, help="of the part `memory`: tokens of each row")
    parser.add_argument("--micros", nargs="+", type=int, default=[4, 5, 6], help="of the part `memory`: micro-batches to try")
    parser.add_argument("--limit-s", type=float, default=300.0, help="seconds of a run at most")
    parser.add_argument("--budget-s", type=float, default=36000.0, help="seconds of all runs at most")
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.length = given.length or (64 if given.tiny else 1024)
    if given.prepare:
        if not (given.folder / given.shape / "base/manifest.json").exists():
            study_memory.write_base(study_memory.configured(given.shape, given.tiny, given.length), given.folder / given.shape)
        print(json.dumps(study_memory.about()))
        return
    runs = Runs(given)
    for name in given.parts:
        try:
            PARTS[name](runs)
        except Exception as error:  # one part that fails does not end the others
            traceback.print_exc()
            runs.note({"part": name, "error": f"{type(error).__name__}: {str(error)[:300]}"})


if __name__ == "__main__":
    main()
