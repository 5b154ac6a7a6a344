"""Measures what `deterministic: true` costs on a GPU, and whether equal runs end with the same bytes under it.

    python -m measurements.deterministic --folder scratch --out deterministic.json            on a GPU, some four minutes
    python -m measurements.deterministic --folder scratch --out trial.json --tiny --steps 6   on a CPU: that it runs

The study's shape (Qwen2.5-0.5B, random weights) and rows as in measurements/training.py: padding left out, the 4-bit base
dequantised, nothing recomputed, nothing compiled. One process makes each phase without the key and with it, in turn (`without`,
`with`), and is timed. Then another one makes both again (`again`), while a third makes SFT by its own command, is killed by
SIGKILL at its first checkpoint, and goes on (`killed`): both are on the card at once, and of these only the bytes count.

Seconds of a step leave the first ones out (training.STEPS_OFF); of PPO, `rollout_s` is the second rollout with all its updates.
`answers` are ROWS answers of 256 tokens (bf16, the adapter beside the weights), drawn at temperature 1; the best of three times.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from measurements import generation, study_memory, training
from tests.support import as_command
from workflow_scripts.generation.answers import ROWS, Answer, Asked
from workflow_scripts.models import device

WAY = "dequantised"
SHARE = 40 * 1024  # MiB of the card that the killed one asks for, beside another process
TRAINED = ("sft_v2", "dpo", "ppo")
NAMES = {False: "without", True: "with"}


def updates(config: Any) -> int:
    """Optimiser steps on one rollout of PPO."""
    train = config.experiments["ppo"]["train"]
    return train["steps_per_generation"] * train["num_iterations"] // train["gradient_accumulation_steps"]


def answers(tiny: bool, machine: dict, deterministic: bool) -> dict:
    device.prepare(machine, deterministic)
    shape, place, dtype = ("tiny", "cpu", torch.float32) if tiny else ("0.5b", "cuda", torch.bfloat16)
    prompts, _ = generation.fixed(16 if tiny else ROWS, generation.SHAPES[shape]["vocab_size"])
    new = 8 if tiny else 256
    began = training.now()
    engine = generation.Measured(generation.model_of(shape, place, dtype, True), len(prompts), max(map(len, prompts)) + new)
    asked, times, digest = Asked((-1,), new, temperature=1.0, seed=4), [], hashlib.sha256()
    for length in (2, new, new, new):
        engine.lengths, made = [length] * len(prompts), dict[int, Answer]()
        start = training.now()
        engine.answer(list(enumerate(prompts)), asked, lambda place, _, answer, made=made: made.__setitem__(place, answer))
        times.append(training.now() - start)
    digest.update(json.dumps([made[place].tokens for place in range(len(prompts))]).encode())
    found = {"phase": "answers", "tokens_per_s": round(new * len(prompts) / min(times[1:]))}
    return found | {"ready_s": round(start - began - sum(times[1:-1]), 1), "sha256": {"tokens": digest.hexdigest()}}


def made(name: str, config: Any, given: argparse.Namespace, slices: dict[str, Path], deterministic: bool, place: str) -> dict:
    if name == "answers":
        return answers(given.tiny, {key: config.data[key] for key in ("device", "precision", "threads")}, deterministic)
    steps = 2 * updates(config) if name == "ppo" else given.steps
    one = training.measure(name, WAY, config, given.folder, slices, steps, f"{name} {place}", deterministic)
    if name == "ppo":
        one["rollout_s"] = round(sum(one["times"][updates(config) :]), 3)
    return one


def part(given: argparse.Namespace, config: Any) -> list[dict]:
    """What one process does."""
    there = given.folder / "slices.json"
    if given.part == "first":
        study_memory.write_base(config, given.folder)
        slices = training.rows(config, given.folder, 16 * given.steps + 40)
        there.write_text(json.dumps({name: str(path) for name, path in slices.items()}))
        if "ppo" in given.phases:
            training.measure("rm", WAY, config, given.folder, slices, 2)
    slices = {name: Path(path) for name, path in json.loads(there.read_text()).items()}
    if given.part == "killed":
        job = training.measured_job("sft_v2", WAY, config, given.folder, slices, given.steps, "sft_v2 killed")
        shutil.rmtree(job.out.parent.parent, ignore_errors=True)
        how = "--deterministic", "--gpu-mb", str(SHARE), "--checkpoint-minutes"
        as_command.kill_in_the_middle(job, *how, "0")
        said = as_command.run(job, *how, "60")
        assert "resumed at step" in said
        resumed = said.partition("resumed at step ")[2].split()[0]
        return [{"phase": "sft_v2", "key": "killed", "resumed_at": int(resumed), "sha256": as_command.digests(job)}]
    found = []
    for name in given.phases:
        for deterministic in (False, True):
            if given.part == "again" and name == "ppo" and not deterministic:
                continue
            began = time.perf_counter()
            one = made(name, config, given, slices, deterministic, f"{given.part} {NAMES[deterministic]}")
            one |= {"key": NAMES[deterministic], "wall_s": round(time.perf_counter() - began, 1)}
            found.append({key: value for key, value in one.items() if key not in ("loss", "way")})
            shown = {key: value for key, value in found[-1].items() if key not in ("times", "sha256")}
            print("RESULT", given.part, json.dumps(shown), flush=True)
    return found


def compared(parts: dict[str, list[dict]]) -> list[dict]:
    """What each phase costs with the key, and whose bytes are equal."""
    found = []
    for one in parts.get("first", []):
        if one["key"] == "with":
            plain = next(other for other in parts["first"] if other["phase"] == one["phase"] and other["key"] == "without")
            unit = next(unit for unit in ("rollout_s", "tokens_per_s", "s_per_step") if unit in one)
            if one["phase"] in ("sft_v2", "dpo"):
                unit = "s_per_step"
            ratio = plain[unit] / one[unit] if unit == "tokens_per_s" else one[unit] / plain[unit]
            row = {"phase": one["phase"], "unit": unit, "without": plain[unit], "with": one[unit], "times": round(ratio, 3)}
            row |= {f"peak_gib {each['key']}": each["peak_gib"] for each in (plain, one) if "peak_gib" in each}
            for name in ("again", "killed"):
                for other in parts.get(name, []):
                    if other["phase"] == one["phase"]:
                        against = plain if other["key"] == "without" else one
                        label = "killed and resumed" if name == "killed" else f"again {other['key']}"
                        row[f"equal bytes {label}"] = against["sha256"] == other["sha256"]
            found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for the base and what is trained, made anew")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU, to see that it runs")
    parser.add_argument("--phases", nargs="+", default=[*TRAINED, "answers"], choices=[*TRAINED, "answers"])
    parser.add_argument("--steps", type=int, default=16, help="of SFT and DPO")
    parser.add_argument("--part", choices=["first", "again", "killed"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    config = study_memory.configured("05b", given.tiny, 64 if given.tiny else 1024)
    if given.part:
        found = part(given, config)
        (given.folder / f"{given.part}.json").write_text(json.dumps([study_memory.about(), found]))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[dict]] = {}
    for together in (["first"], ["again", "killed"] if "sft_v2" in given.phases else ["again"]):
        command = [sys.executable, "-m", "measurements.deterministic", *sys.argv[1:], "--part"]
        env = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # as steps/cli.py has it, before CUDA starts
        running = [subprocess.Popen([*command, name], env=env) for name in together]
        for name, process in zip(together, running, strict=True):
            if process.wait():
                print(f"{name}: failed", flush=True)
                continue
            machine, parts[name] = json.loads((given.folder / f"{name}.json").read_text())
            found = {"machine": machine, "compared": compared(parts), "parts": parts}
            given.out.write_text(json.dumps(found, indent=1) + "\n")
    for row in compared(parts):
        print("COMPARED", json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
