"""Measures trainings at the study's shape (Qwen2.5-0.5B, random weights), by the project's own steps: the study's recipe, and the
same rows with each of `speed`'s ways added to the last (training/speed.py), in one process.

    python -m measurements.training --out training.json                          on a GPU
    python -m measurements.training --out trial.json --tiny --phases sft_v2      on a CPU, at a tiny shape: that it runs

Rows have 64 to 1,024 tokens, 789 in the mean, as long as UltraChat's. `study` is config/qwen05b.yaml as it stands, with padding,
activation checkpointing and small micro-batches: what TRL does when it is asked for this recipe. The others take the effective
batch at once and recompute nothing. Tokens are real ones, without padding, of a
pair those of both sides. Seconds of a step are the mean without the first STEPS_OFF; `first_s` is how long these took, with what
was compiled in them; `outside_s` all that is not a step: loading, the held-out objective, saving.
"""

import argparse
import gc
import json
import random
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from measurements import study_memory
from tests.support import as_command, small_steps
from workflow_scripts.artifacts import manifests
from workflow_scripts.config.experiments import rewards
from workflow_scripts.data.unpaired import kl_rows
from workflow_scripts.models import chat

STEPS_OFF = 4
PAIRED = ("dpo", "rm")
SAMPLED = ("ppo", "grpo", "rloo")
WAYS: dict[str, dict] = {
    "study": {},
    "at once": {},
    "unpadded": {"unpadded": True},
    "dequantised": {"unpadded": True, "dequantised": True},
    "fused": {"unpadded": True, "dequantised": True, "fused": True},
    "captured": {"unpadded": True, "dequantised": True, "fused": True, "captured": True},
    "compiled": {"unpadded": True, "dequantised": True, "fused": True, "captured": True, "compiled": 1},
}


def lengths(count: int, longest: int) -> list[int]:
    """Skewed to the cap, as chat data are that were cut there: mean 0.77 of it."""
    draw, mean = random.Random(5), 0.77
    shortest = min(64, longest // 2)
    mean = (mean * longest - shortest) / (longest - shortest)
    return [int(shortest + (longest - shortest) * draw.betavariate(2.2 * mean, 2.2 * (1 - mean))) for _ in range(count)]


def rows(config: Any, folder: Path, count: int) -> dict[str, Path]:
    longest = config.experiments["sft_v2"]["train"]["max_length"]
    draw = random.Random(6)
    words = ["one", "two", "three", "four", "five", "six"]

    tokenizer = chat.tokenizer_of(manifests.read(folder / "base/manifest.json"))
    each = len(tokenizer(" ".join(words * 50))["input_ids"]) / (50 * len(words))  # tokens of a word

    def text(tokens: float) -> str:
        return " ".join(draw.choice(words) for _ in range(max(4, round(tokens / each))))

    talks, pairs = [], []
    for i, length in enumerate(lengths(count, longest - 48)):
        asked = length * draw.uniform(0.3, 0.6)
        user = {"role": "user", "content": f"{i} {text(asked)}"}
        answers = [[{"role": "assistant", "content": text(length - asked - 16 * n)}] for n in (0, 1)]
        talks.append({"messages": [user, *answers[0]]})
        pairs.append({"prompt": [user], "chosen": answers[0], "rejected": answers[1]})
    held = {"sft": 16, "pairs": 16}
    made = {name: small_steps.write_slice(folder / "timed", name, given, held[name])
            for name, given in (("sft", talks), ("pairs", pairs))}  # fmt: skip
    return study_memory.slices(config, folder) | made


class Clock:
    """When each optimiser step ended, and how many real tokens it took."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.tokens: Any = 0
        self.counts: list[Any] = []

    def watch(self, trainer_class: Any) -> Any:
        real, clock = trainer_class.training_step, self

        def training_step(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
            if not clock.ends:
                clock.ends.append(now())
            if mask is not None:
                clock.tokens = clock.tokens + mask.sum()
            found = real(trainer, model, inputs, *args, **kwargs)
            if trainer.accelerator.sync_gradients:
                clock.counts.append(clock.tokens)
                clock.tokens = 0
            return found

        trainer_class.training_step = training_step
        return real


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def job_of(name: str, train: dict, config: Any, folder: Path, slices: dict[str, Path], place: str) -> manifests.Job:
    """The training of an experiment with these settings, in a folder of its own."""
    body, data = config.experiments[name], config.data
    settings = {key: value for key, value in body.items() if key not in ("start_from", "slice")} | {"train": train}
    settings |= {"lora": data["lora"], "optim": "paged_adamw_32bit" if data["device"] == "cuda" else "adamw_torch"}
    settings |= {"quant": data["quant"]} if body["quantise"] != "none" else {}
    settings |= {"kl_rows": kl_rows(body)} if body["method"] == "kto" else {}  # those of the config's own micro-batch
    settings |= {"reward": rewards(body), "generation": data["generation"]["rollouts"]} if "reward" in body else {}
    base = folder / "base/manifest.json"
    parents = {"start": base, "rows": slices[body["slice"]]}
    if "rm" in rewards(body):
        parents |= {"start of rm": base, "reward rm": folder / "rm/adapter/manifest.json"}
    job = small_steps.job(f"train_{body['method']}", folder / place / "adapter/manifest.json", parents, settings)
    job.step |= {key: data[key] for key in ("device", "precision", "threads")} | {"seed": 1}
    return job


def measured_job(name: str, way: str, config: Any, folder: Path, slices: dict[str, Path], steps: int, place: str,
                 logging: int = 1, parts: int = 1) -> manifests.Job:  # fmt: skip
    """logging: steps between two losses; parts: micro-batches of an effective batch, but of the study's own way."""
    method, train = config.experiments[name]["method"], dict(config.experiments[name]["train"])
    train |= {"max_steps": steps, "logging_steps": logging}
    if way != "study":
        train["gradient_checkpointing"] = False
        if method == "ppo":
            train["steps_per_generation"] //= train["gradient_accumulation_steps"]
        train["per_device_train_batch_size"] *= train["gradient_accumulation_steps"]
        train["per_device_train_batch_size"] //= parts
        train["gradient_accumulation_steps"] = parts
    job = job_of(name, train, config, folder, slices, place)
    job.speed = WAYS[way]
    return job


def measure(name: str, way: str, config: Any, folder: Path, slices: dict[str, Path], steps: int, place: str = "",
            deterministic: bool = False, logging: int = 1, parts: int = 1) -> dict:  # fmt: skip
    import trl

    from workflow_scripts.rl.ppo_trainer import PPOTrainer
    from workflow_scripts.training import trainers

    method, clock = config.experiments[name]["method"], Clock()
    place = place or ("rm" if name == "rm" else f"{name} {way}")
    job = measured_job(name, way, config, folder, slices, steps, place, logging, parts)
    job.deterministic, train = deterministic, job.config["train"]
    kind: Any = PPOTrainer if method == "ppo" else getattr(trl, study_memory.TRAINERS[method])
    real, real_end = clock.watch(kind), trainers.Watch.on_step_end

    def on_step_end(watch: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        clock.ends.append(now())
        real_end(watch, args, state, control, **kwargs)

    trainers.Watch.on_step_end = on_step_end  # type: ignore[method-assign]
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = now()
    try:
        made = small_steps.run(job)
    finally:
        kind.training_step, trainers.Watch.on_step_end = real, real_end  # type: ignore[method-assign]
    whole, times = now() - began, [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]
    kept = times[STEPS_OFF:] or times
    tokens = [int(count) for count in clock.counts][-len(kept) :]
    import pandas

    curve = pandas.read_csv(made.folder / "metrics.csv")["loss"].dropna().tolist()
    found = {
        "phase": name, "way": way, "steps": len(times), "s_per_step": round(fmean(kept), 4), "median_s": round(median(kept), 4),
        "first_s": round(sum(times[:STEPS_OFF]), 1), "outside_s": round(whole - sum(times), 1),
        "batch": [train["per_device_train_batch_size"], train["gradient_accumulation_steps"]],
        "loss": [round(value, 4) for value in curve[:8]], "times": [round(value, 3) for value in times],
        "sha256": as_command.digests(job),
    }  # fmt: skip
    if method not in SAMPLED and sum(tokens):
        found |= {"tokens_per_step": round(fmean(tokens)), "tokens_per_s": round(sum(tokens) / sum(kept))}
    if torch.cuda.is_available():
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for the base and what is trained; a base there is taken")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU, to see that it runs")
    parser.add_argument("--phases", nargs="+", default=["sft_v2", "dpo", "kto", "rm"])
    parser.add_argument("--ways", nargs="+", default=[*WAYS], choices=[*WAYS])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--logging", type=int, default=1, help="steps between two losses, for which the card is waited for")
    parser.add_argument("--parts", type=int, default=1, help="micro-batches of an effective batch, but of the study's own way")
    given = parser.parse_args()
    config = study_memory.configured("05b", given.tiny, 64 if given.tiny else 1024)
    if not (given.folder / "base/manifest.json").exists():
        study_memory.write_base(config, given.folder)
    slices = rows(config, given.folder, 16 * given.steps + 40)
    found: dict = {"machine": study_memory.about(), "runs": []}
    for name in given.phases:
        for way in given.ways:
            began = time.perf_counter()
            try:
                steps = min(given.steps, 7) if way == "study" else given.steps
                one = measure(name, way, config, given.folder, slices, steps, logging=given.logging, parts=given.parts)
            except Exception as error:  # one that does not fit is a result as well
                import traceback

                traceback.print_exc()
                one = {"phase": name, "way": way, "error": f"{type(error).__name__}: {str(error)[:300]}"}
            one["wall_s"] = round(time.perf_counter() - began, 1)
            found["runs"].append(one)
            print("RESULT", json.dumps(one), flush=True)
            given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
