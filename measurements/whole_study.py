"""Times the whole study at its sizes through snakemake: seven methods, a reward model and nine IFEvals, of one seed, on one GPU.

    python -m measurements.whole_study --folder scratch --out study.json                        on a GPU
    python -m measurements.whole_study --folder scratch --out trial.json --tiny --plan          on a CPU: what would run

config/qwen05b.yaml and config/large_gpu.yaml with random weights of the base's shape (no hub is asked) and rows made here: 5,000
conversations and 5,000 pairs to train on, of 64 to 1,024 tokens, 0.77 of that in the mean (measurements/training.py), 2,000
prompts for PPO. IFEval's 541 prompts and GSM8K's questions are the real ones. Random weights know no end of turn, so every answer
is as long as it may be: 1,280 tokens in IFEval, 512 in a rollout; a trained model's are shorter.

Micro-batches are `--micro` sequences, so that several jobs have room on the card beside each other. Making the weights
and the rows is not in the time; the pipeline's own steps of base and slices are. The file has the wall time, when each job had
ended, a training's steps and peak, and of one that did not end how far it came.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from measurements import study_memory
from measurements.training import lengths
from workflow_scripts.artifacts import manifests
from workflow_scripts.config.names import PAIRED
from workflow_scripts.config.written import merge
from workflow_scripts.models import chat

RUNS = ("base", "sft_v1", "sft_v2", "sft_v2_merged", "dpo", "kto", "ppo", "grpo", "rloo")
LONGEST = 1024


def write_rows(folder: Path, sizes: dict[str, int], longest: int) -> None:
    """Conversations, pairs and prompts of words that the tokenizer knows, as long as asked."""
    draw, words = random.Random(6), ["one", "two", "three", "four", "five", "six"]
    tokenizer = chat.tokenizer_of(manifests.read(folder / "made/base/manifest.json"))
    each = len(tokenizer(" ".join(words * 50))["input_ids"]) / (50 * len(words))  # tokens of a word

    def text(tokens: float) -> str:
        return " ".join(draw.choice(words) for _ in range(max(4, round(tokens / each))))

    for name, count in sizes.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for i, length in enumerate(lengths(count, longest - min(48, longest // 4))):
                asked = length * draw.uniform(0.3, 0.6)
                user = {"role": "user", "content": f"{name} {i} {text(asked)}"}
                better, worse = ({"role": "assistant", "content": text(length - asked - 16 * n)} for n in (0, 1))
                if name == "sft":
                    row: dict = {"messages": [user, better]}
                else:
                    row = {"prompt": [user], "chosen": [better], "rejected": [worse]}
                file.write(json.dumps(row) + "\n")


def write_config(folder: Path, given: argparse.Namespace) -> Path:
    """The study's config over rows of this folder, one seed, and only what is timed."""
    data: dict[str, Any] = {}
    for name in ("qwen05b", "large_gpu"):
        data = merge(data, yaml.safe_load(Path(f"config/{name}.yaml").read_text(encoding="utf-8")))
    for part in ("models", "report"):
        del data[part]
    of, longest = data["data"]["slices"], 64 if given.tiny else LONGEST
    kept = {name: of[name] for name in ("ifeval", "gsm8k_train")}
    for name in ("sft", "pairs", "prompts"):
        kept[name] = {key: of[name][key] for key in ("kind", "rows", "heldout", "seed")} | {
            "source": {"path": str(folder / f"{name}.jsonl")}
        }
    data["data"] |= {"slices": kept, "max_prompt_tokens": longest - 1}
    data["base"] = {key: data["base"][key] for key in ("shape", "dtype")} | {"source": "path", "path": str(folder / "made/base")}
    data["eval"] = {key: data["eval"][key] for key in ("precision", "batch_size", "ifeval")}
    data["experiments"] = {name: body for name, body in data["experiments"].items() if name in (*RUNS, "rm")}
    data["seeds"], data["pathvars"] = [1], {name: str(folder / name) for name in ("results", "logs", "benchmarks")}
    data["threads"], data["allow_package_mismatch"] = 2, True
    more: dict[str, Any] = {method: {"require_reward_above_chance": False} for method in ("ppo", "grpo", "rloo")}
    for method in ("sft", "dpo", "kto", "rm", "ppo", "grpo", "rloo"):
        micro = given.micro // (2 if method in PAIRED else 1)  # a pair is two
        train = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 16 // micro}
        if method == "ppo":
            train["steps_per_generation"] = 64 // given.micro
        if method in ("grpo", "rloo"):
            train["gradient_accumulation_steps"] *= 2
        more[method] = merge(more.get(method, {}), {"train": train})
    for method in ("sft", "dpo", "kto", "rm"):
        more[method] = merge(more.get(method, {}), {"train": {"max_length": longest}})
    data["methods"] = merge(data["methods"], more)
    if given.tiny:
        data = merge(data, {key: study_memory.TINY[key] for key in ("device", "precision", "threads", "lora", "base")})
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False, width=130), encoding="utf-8")
    return path


def jobs(folder: Path, began: float) -> list[dict]:
    """What each training and each answering took, from its own notes, in the order of their ends."""
    found = []
    for path in sorted(one for one in folder.glob("results/**/run.json") if ".work" not in one.parts):
        info = json.loads(path.read_text())
        one = {"job": str(path.parent.relative_to(folder / "results")), "ended_s": round(path.stat().st_mtime - began, 1)}
        one |= {key: info[key] for key in ("steps", "tokens", "gpu_peak_memory_bytes") if key in info}
        found.append(one | {"timing": info.get("timing", {})})
    for path in sorted(folder.glob("logs/*/train.log")):
        stopped = re.findall(r"at step (\d+) of (\d+), with a checkpoint", path.read_text(errors="replace"))
        if stopped:
            found.append({"job": f"{path.parent.name}/adapter", "not_done": [int(number) for number in stopped[-1]]})
    for path in sorted(folder.glob("results/ifeval_*.json")):
        found.append({"job": path.name, "ended_s": round(path.stat().st_mtime - began, 1)})
    for path in sorted(folder.glob("benchmarks/**/*")):
        if path.is_file():
            header, values = (line.split("\t") for line in path.read_text().splitlines()[:2])
            one = dict(zip(header, values, strict=True))
            found.append({"benchmark": str(path.relative_to(folder / "benchmarks")), "s": float(one["s"])})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for base, rows and results; what is there is taken")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny shape on the CPU, with --plan: its rows have no room for real questions"
    )
    parser.add_argument("--plan", action="store_true", help="only plan it")
    parser.add_argument("--micro", type=int, default=8, help="sequences of a micro-batch")
    parser.add_argument("--cores", type=int, default=16)
    parser.add_argument("--at-once", type=int, default=6, help="jobs on the card at most")
    parser.add_argument(
        "--gpu-mb", nargs="*", default=[], metavar="RULE=MB", help="memory that jobs of a rule ask for, in place of the estimate"
    )
    parser.add_argument("--limit-s", type=float, default=3600.0, help="it is stopped then, and what was done is written")
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "made/base/manifest.json").exists():
        # In a process of its own, which takes what it has of the card along.
        code = "import sys, pathlib, measurements.study_memory as m; folder, tiny = sys.argv[1:]; "
        code += "m.write_base(m.configured('05b', tiny == 'tiny', 64), pathlib.Path(folder))"
        subprocess.run([sys.executable, "-c", code, str(folder / "made"), "tiny" if given.tiny else "0.5b"], check=True)
    sizes = {"sft": 5250, "pairs": 5250, "prompts": 2100}
    write_rows(folder, sizes, 64 if given.tiny else LONGEST)
    config = write_config(folder, given)
    targets = [str(folder / f"results/ifeval_{run}.json") for run in RUNS]
    command = ["snakemake", *targets, "--configfile", str(config), "--cores", str(given.cores), "--keep-going"]
    command += ["--resources", f"gpu={given.at_once}", "--prioritize"]
    command += [str(folder / f"results/{run}/adapter/manifest.json") for run in ("ppo", "grpo", "rloo")]  # the longest chains
    wanted = [f"{rule}:gpu_mb={size}" for rule, size in (one.split("=") for one in given.gpu_mb)]
    command += ["--set-resources", *wanted] if wanted else []
    command += ["--dry-run", "--quiet", "rules"] if given.plan else []
    began, stopped = time.time(), False
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(given.limit_s)
    except subprocess.TimeoutExpired:
        stopped = True
        os.killpg(process.pid, signal.SIGTERM)
        code = process.wait()
    wall = round(time.time() - began, 1)
    found = {"machine": study_memory.about(), "wall_s": wall, "stopped": stopped, "exit": code, "micro": given.micro}
    found |= {"at_once": given.at_once, "cores": given.cores, "jobs": jobs(folder, began)}
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print("RESULT", json.dumps({key: found[key] for key in ("wall_s", "stopped", "exit")}), flush=True)


if __name__ == "__main__":
    main()
