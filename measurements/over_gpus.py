"""Measures one training over several GPUs against the same on one: seconds of its steps, of all of it, and how losses differ.

    python -m measurements.over_gpus --out over_gpus.json --folder /tmp/over --gpus 1 2                  on a host with two GPUs
    python -m measurements.over_gpus --out trial.json --folder /tmp/over --tiny --phases sft_v2 --steps 4  on a CPU: that it runs

The study's shape (Qwen2.5-0.5B, random weights) by the steps' own commands, rows as in measurements/training.py, nothing
recomputed. The effective batch is 128, in micro-batches of 16 (`--micro`), so that two and four cards share eight of them.
`efficiency` is the time of the steps on one card over the time on N, divided by N; `whole_efficiency` the same of all of the job,
with loading, the reference and the held-out objective. `apart` is the largest difference of two losses of one step.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pandas

from measurements import study_memory
from measurements.training import job_of, rows

BATCH = 128


def run(name: str, gpus: int, config, folder: Path, slices: dict[str, Path], given: argparse.Namespace) -> dict:
    body = config.experiments[name]
    train = dict(body["train"]) | {"max_steps": given.steps, "logging_steps": 1, "gradient_checkpointing": False}
    train |= {"per_device_train_batch_size": given.micro, "gradient_accumulation_steps": BATCH // given.micro}
    train |= {"steps_per_generation": BATCH // given.micro} if "num_generations" in train else {}
    job = job_of(name, train, config, folder, slices, f"{name} on {gpus}")
    command = [sys.executable, "-m", f"workflow_scripts.steps.{job.step['step']}", "--step", json.dumps(job.step)]
    command += ["--inputs", *map(str, job.inputs), "--out", str(job.out), "--work", str(job.work), "--gpus", str(gpus)]
    command += ["--speed", json.dumps({"unpadded": True, "dequantised": True, "compiled": 0})]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"phase": name, "gpus": gpus, "error": done.stderr.strip().splitlines()[-1][:400]}
    info = json.loads((job.out.parent / "run.json").read_text())
    curve = pandas.read_csv(job.out.parent / "metrics.csv")["loss"].dropna().tolist()
    steps = info["timing"]["train_runtime"]
    found = {"phase": name, "gpus": gpus, "steps": info["steps"], "steps_s": round(steps, 2), "loss": curve}
    found |= {"whole_s": round(time.monotonic() - began, 1), "tokens_per_s": info["tokens"] and round(info["tokens"] / steps)}
    return found | {"peak_gib": round(info.get("gpu_peak_memory_bytes", 0) / 2**30, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for the base and what is trained; a base there is taken")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU, to see that it runs")
    parser.add_argument("--phases", nargs="+", default=["sft_v2", "dpo", "kto", "grpo"])
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2], help="the first is what the others are held against")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--micro", type=int, default=16)
    given = parser.parse_args()
    config = study_memory.configured("05b", given.tiny, 64 if given.tiny else 1024)
    if not (given.folder / "base/manifest.json").exists():
        study_memory.write_base(config, given.folder)
    slices = rows(config, given.folder, BATCH * given.steps + 40)
    found: dict = {"machine": study_memory.about(), "runs": []}
    for name in given.phases:
        first: dict = {}
        for gpus in given.gpus:
            one = run(name, gpus, config, given.folder, slices, given)
            first = first or one
            if "error" not in one and "error" not in first and one is not first:
                more = gpus / first["gpus"]
                one["efficiency"] = round(first["steps_s"] / one["steps_s"] / more, 3)
                one["whole_efficiency"] = round(first["whole_s"] / one["whole_s"] / more, 3)
                one["apart"] = max(abs(a - b) for a, b in zip(first["loss"], one["loss"], strict=True))
            found["runs"].append(one)
            print("RESULT", json.dumps({key: value for key, value in one.items() if key != "loss"}), flush=True)
            given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
