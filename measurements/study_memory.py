"""Peak GPU memory of each phase of the study at its true shape with random weights, beside what plan/gpu_memory.py estimates.

    python measurements/study_memory.py --out memory.json               on a CUDA machine
    python measurements/study_memory.py --card 16 --out memory.json     with no more memory than a card of 16 GB has
    python measurements/study_memory.py --shape 7b --out memory7b.json  config/qwen7b.yaml over the study; 40 GB by the estimate
    python measurements/study_memory.py --tiny --out trial.json         on a CPU, at a tiny shape: that it runs (no peaks there)

The project's own steps and trainers, with the study's batches, on rows that fill 1,024 tokens (`--length`; every other row a
little less, so that batches are padded), a process each. Two optimiser steps, because the optimiser has its moments from the
second on. `allocated` is torch's peak in the training steps, with the rollout where answers are sampled, `other` that of
everything before and after (loading, a reference, the held-out objective), `reserved` what the allocator held at most. Weights
are drawn here: no hub is asked. `trainable` of PPO is the policy's, the estimate that of policy and value function.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PHASES = ("sft_v2", "dpo", "dpo_4bit", "kto", "rm", "eval_rm", "ppo", "grpo", "rloo", "ifeval", "mmlu", "truthfulqa")
TRAINERS = {
    "sft": "SFTTrainer",
    "dpo": "DPOTrainer",
    "kto": "KTOTrainer",
    "rm": "RewardTrainer",
    "grpo": "GRPOTrainer",
    "rloo": "RLOOTrainer",
}
STEPS = 2
TINY = {
    "device": "cpu", "precision": "fp32", "threads": 2, "lora": {"r": 4, "alpha": 8},
    "base": {"dtype": "fp32", "shape": {
        "parameters": 66720, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 64, "vocab_size": 1500, "tie_word_embeddings": True,
    }},
    "eval": {"precision": "fp32", "batch_size": 2, "ifeval": {"max_new_tokens": 8}},
    "methods": {
        method: {"train": {
            "per_device_train_batch_size": size, "per_device_eval_batch_size": 2, "gradient_accumulation_steps": 2,
        }}
        for method, size in {"sft": 2, "dpo": 1, "kto": 2, "rm": 2, "ppo": 2, "grpo": 2, "rloo": 2}.items()
    },
}  # fmt: skip


def configured(shape: str, tiny: bool, length: int, backend: str = "graphs"):
    """The study, with rows and prompts of this length, as steps and the estimator are given it. backend: who writes answers."""
    from workflow_scripts.config.config import Config, load
    from workflow_scripts.config.written import merge

    files = ["config/qwen05b.yaml", *(["config/qwen7b.yaml"] if shape == "7b" else [])]
    rows = {"train": {"max_length": length, "max_steps": STEPS}}
    sampled = {"train": {"max_completion_length": length // 2, "max_steps": STEPS}, "require_reward_above_chance": False}
    more = {
        "speed": {
            "unpadded": False,
            "dequantised": False,
            "compiled": 0,
        },  # as when the table was measured
        "generation": {"backend": backend, "rollouts": backend},
        "data": {"max_prompt_tokens": length - length // 2, "slices": {"prompts": {"max_prompt_tokens": length - length // 2}}},
        "methods": dict.fromkeys(("sft", "dpo", "kto", "rm"), rows) | dict.fromkeys(("ppo", "grpo", "rloo"), sampled),
    }
    data = merge(load(*files).data, more)
    if tiny:
        data = merge(data, TINY)
        for method in ("ppo", "grpo", "rloo"):
            data["methods"][method]["train"]["num_generations" if method != "ppo" else "steps_per_generation"] = 2
    return Config(data)


def write_base(config, folder: Path) -> None:
    """Random weights of the config's shape, and the tiny world's tokenizer: few of the tokens occur, all have a logit.

    Answers are made of the tokens that the tokenizer has and do not end, so that they are as long in text: the other rows of the
    embedding are 0, its own large.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.support import small_steps
    from workflow_scripts.artifacts import manifests
    from workflow_scripts.models import chat

    tokenizer = chat.tokenizer_of(manifests.read(small_steps.write_base(folder / "tiny")))
    shape = dict(config.data["base"]["shape"])
    parameters = shape.pop("parameters")
    dtype = torch.bfloat16 if config.data["base"]["dtype"] == "bf16" else torch.float32
    torch.manual_seed(1)
    torch.set_default_dtype(dtype)
    with torch.device(config.data["device"]):
        made = Qwen2Config(
            **shape, max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
        model = Qwen2ForCausalLM(made)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows *= 15  # the best logit some 30 above a strange token's 0; much wider ones would make rounding a matter of many nats
        rows[len(tokenizer) :] = 0
        rows[[tokenizer.eos_token_id, tokenizer.pad_token_id]] *= 1e-3  # not 0: make_base refuses an end that no training touched
        if not made.tie_word_embeddings:
            model.lm_head.weight.copy_(rows)
    assert model.num_parameters() == parameters, f"{model.num_parameters()} parameters, the config says {parameters}"
    model.save_pretrained(folder / "base", max_shard_size="1000GB")
    tokenizer.save_pretrained(folder / "base")
    names = sorted(path.name for path in (folder / "base").iterdir())
    small_steps.write_manifest(folder / "base/manifest.json", "base", "random weights", names)


def filled(tokenizer, turns: list[dict], length: int, word: str) -> list[dict]:
    """Turns whose last one is made as long as `length` tokens of the whole conversation allow."""

    def made(count: int) -> list[dict]:
        return [*turns[:-1], turns[-1] | {"content": " ".join([turns[-1]["content"], *[word] * count])}]

    def tokens(count: int) -> int:
        generation = turns[-1]["role"] == "user"
        return len(tokenizer.apply_chat_template(made(count), add_generation_prompt=generation)["input_ids"])

    low, high = 0, length  # a word takes a token or more
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tokens(middle) <= length else (low, middle - 1)
    return made(low)


def slices(config, folder: Path) -> dict[str, Path]:
    """Rows of every kind that fill what the config allows: enough for two steps, and a batch of held-out ones."""
    from tests.support import small_steps
    from workflow_scripts.artifacts import manifests
    from workflow_scripts.models import chat
    from workflow_scripts.plan.gpu_memory import EVAL_PROMPT

    tokenizer = chat.tokenizer_of(manifests.read(folder / "base/manifest.json"))
    train = config.experiments["sft_v2"]["train"]
    length, prompt = train["max_length"], config.data["data"]["max_prompt_tokens"]
    user, answers = {"role": "user", "content": "go on"}, config.at_once()
    talk = [user, {"role": "assistant", "content": "the"}]
    chosen, rejected = (filled(tokenizer, talk, length, word)[1:] for word in ("one", "two"))
    asked = filled(tokenizer, [user], prompt, "three")
    long = filled(tokenizer, [user], EVAL_PROMPT if prompt > 100 else prompt, "four")
    texts = [f"{i} {less(long, 3)[0]['content']}" for i in range(8)]  # questions differ, as equal ones would be asked once
    question = {"choices": ["one", "two", "three", "four"], "answer": 0, "subject": "anatomy"}
    options = {"choices": [f"one or {word}" for word in ("two", "three", "four", "five")], "labels": [1, 0, 0, 0]}
    targets = {"mc1_targets": options, "mc2_targets": options}
    rows = {
        "sft": [{"messages": [user, *less(chosen, i % 2)]} for i in range(40)],
        # The numbers make prompts differ, as a slice of pairs must; less of the answers leaves room for them.
        "pairs": [
            {"prompt": [{**user, "content": f"go on {i}"}], "chosen": less(chosen, 8), "rejected": less(rejected, 8 + i % 2)}
            for i in range(48)
        ],
        "prompts": [{"prompt": less(asked, i % 2), "chosen": chosen, "rejected": rejected} for i in range(80)],
        "gsm8k_train": [{"prompt": less(asked, i % 2), "final": "4", "answer": "4"} for i in range(40)],
        "ifeval": [{"key": i, "prompt": less(long, i % 2)[0]["content"]} for i in range(answers)],
        "mmlu": [{"key": f"anatomy:{i}", "question": text, **question} for i, text in enumerate(texts)],
        "mmlu_dev": [{"key": f"dev/anatomy:{i}", "question": text, **question} for i, text in enumerate(texts[:5])],
        "truthfulqa": [{"key": f"t:{i}", "question": text, **targets} for i, text in enumerate(texts)],
    }
    held = {"sft": train["per_device_eval_batch_size"], "gsm8k_train": 2} | dict.fromkeys(
        ("ifeval", "mmlu", "mmlu_dev", "truthfulqa"), 0
    )
    return {name: small_steps.write_slice(folder / "data", name, made, held.get(name, 8)) for name, made in rows.items()}


def less(turns: list[dict], words: int) -> list[dict]:
    """Turns whose last one is so many words shorter."""
    said = turns[-1]["content"].split()
    return [*turns[:-1], turns[-1] | {"content": " ".join(said[: len(said) - words])}]


class Peaks:
    """torch's peaks in the training steps and outside of them."""

    def __init__(self, cuda: bool):
        self.cuda, self.inside, self.outside, self.row, self.tail = cuda, [], [], 0, 0

    def read(self) -> int:
        import torch

        if not self.cuda:
            return 0
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak

    def watch(self, trainer_class) -> None:
        real, peaks = trainer_class.training_step, self

        def training_step(trainer, *args, **kwargs):
            peaks.outside.append(peaks.read())
            found = real(trainer, *args, **kwargs)
            peaks.inside.append(peaks.read())
            return found

        trainer_class.training_step = training_step

    def watch_options(self, model_class) -> None:
        """Keeps the longest row of multiple choice, and most tokens of one that got logits."""
        real, peaks = model_class.forward, self

        def forward(model, input_ids, **more):
            peaks.row, peaks.tail = max(peaks.row, input_ids.shape[1]), max(peaks.tail, more["logits_to_keep"])
            return real(model, input_ids, **more)

        model_class.forward = forward


def measure(name: str, config, folder: Path, card: float | None) -> dict:
    """One phase, in this process, with the memory of a card of so many GB: what it took, beside the estimate."""
    import torch
    import transformers
    import trl

    from tests.support import small_steps
    from workflow_scripts.config import choices
    from workflow_scripts.config.experiments import rewards
    from workflow_scripts.config.names import CHOICE
    from workflow_scripts.plan.gpu_memory import Memory
    from workflow_scripts.plumbing.gpus import CONTEXT
    from workflow_scripts.rl.ppo_trainer import PPOTrainer

    data, base = config.data, folder / "base/manifest.json"
    memory, rows, peaks = Memory(config), slices(config, folder), Peaks(data["device"] == "cuda")
    if card:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((card * 1e9 - CONTEXT) / whole)
    machine = {key: data[key] for key in ("device", "precision", "threads")}
    reward_model = {"start of rm": base, "reward rm": folder / "rm/adapter/manifest.json"}
    if name == "ifeval":
        parents = {"start": base, "adapter": folder / "sft_v2/adapter/manifest.json", "prompts": rows["ifeval"]}
        evaluation = data["eval"]
        settings = {"max_new_tokens": evaluation["ifeval"]["max_new_tokens"], "decoding": "greedy"}
        settings["generation"] = config.generation()
        phase, step, out = (
            memory.generate("ifeval", config.at_once()),
            "generate",
            folder / "sft_v2/ifeval_responses.manifest.json",
        )
        machine["precision"] = data["eval"]["precision"]
    elif name in CHOICE:
        parents = {"start": base, "adapter": folder / "sft_v2/adapter/manifest.json", "prompts": rows[name]}
        if fewshot := choices.fewshot(data["eval"], name):
            parents["fewshot"] = rows[fewshot]
        settings = choices.step_config(data["eval"], name)
        step, out = "lm_eval_task", folder / f"sft_v2/{name}_sft_v2.json"
        peaks.watch_options(transformers.Qwen2ForCausalLM)
        machine["precision"] = data["eval"]["precision"]
    elif name == "eval_rm":
        body = config.experiments["rm"]
        parents = {"start": base, "adapter": reward_model["reward rm"], "rows": rows["pairs"]}
        settings = {"quantise": body["quantise"], "quant": data["quant"], "max_length": body["train"]["max_length"]}
        settings["batch_size"] = body["train"]["per_device_eval_batch_size"]
        phase, step, out = memory.eval_rm("rm", body), "eval_rm", folder / "rm/rm_eval.json"
    else:
        body = config.experiments[name]
        method = body["method"]
        settings = {key: value for key, value in body.items() if key not in ("start_from", "slice")}
        settings |= {"lora": data["lora"], "optim": "paged_adamw_32bit" if data["device"] == "cuda" else "adamw_torch"}
        settings |= {"quant": data["quant"]} if body["quantise"] != "none" else {}
        settings |= {"reward": rewards(body), "generation": data["generation"]["rollouts"]} if "reward" in body else {}
        parents = {"start": base, "rows": rows[body["slice"]]} | (reward_model if "rm" in rewards(body) else {})
        phase, step, out = memory.train(name, body), f"train_{method}", folder / name / "adapter/manifest.json"
        peaks.watch(PPOTrainer if method == "ppo" else getattr(trl, TRAINERS[method]))
    job = small_steps.job(step, out, parents, settings)
    job.step |= machine
    started = time.monotonic()
    made = small_steps.run(job)
    peaks.outside.append(peaks.read())
    if name in CHOICE:
        phase = memory.choose(name, peaks.row, peaks.tail)
    found = {
        "phase": name,
        "seconds": round(time.monotonic() - started, 1),
        "estimate": round(phase.peak),
        "stages": phase.stages,
    }
    if name in CHOICE:
        found |= {"row": peaks.row, "tail": peaks.tail}
    if made.data.get("constant"):
        found["trainable"] = made.data["constant"]["trainable_parameters"]
        found["trainable_estimated"] = phase.trainable
        found["training_steps"] = len(peaks.inside)
    if peaks.cuda:
        found |= {"allocated": max(peaks.inside or peaks.outside), "other": max(peaks.outside)}
        found["reserved"] = torch.cuda.max_memory_reserved()
        found["ratio"] = round(phase.peak / max(found["allocated"], found["other"]), 3)
    return found


def about() -> dict:
    """The machine and the versions; in a process of its own, which takes its CUDA context along when it ends."""
    import bitsandbytes
    import torch
    import transformers
    import trl

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    packages = {one.__name__: one.__version__ for one in (torch, transformers, trl, bitsandbytes)}
    return {"device": name, **packages}


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shape", choices=["05b", "7b"], default="05b")
    made.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU, to see that it runs")
    made.add_argument("--card", type=float, help="GB that torch may take, less what a CUDA context has; beyond is out of memory")
    made.add_argument("--length", type=int, help="tokens of a row (default: 1024; with --tiny 64)")
    made.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES, help="ppo and eval_rm need rm, tasks need sft_v2")
    made.add_argument("--out", type=Path, required=True, help="a JSON file for what was measured")
    made.add_argument("--one", nargs=2, metavar=("PHASE", "FOLDER"), help=argparse.SUPPRESS)
    args = made.parse_args()
    length = args.length or (64 if args.tiny else 1024)
    config = configured(args.shape, args.tiny, length)
    if args.one:
        name, folder = args.one[0], Path(args.one[1])
        if name == "base":
            write_base(config, folder)
        print(json.dumps(about() if name == "base" else measure(name, config, folder, args.card)))
        return
    with tempfile.TemporaryDirectory(prefix="study_memory.") as folder:
        found: dict = {"shape": "tiny" if args.tiny else args.shape, "length": length, "card": args.card, "phases": []}
        for name in ("base", *(one for one in PHASES if one in args.phases)):
            command = [sys.executable, __file__, "--shape", args.shape, "--length", str(length), "--out", str(args.out)]
            command += [*(["--tiny"] if args.tiny else []), *(["--card", str(args.card)] if args.card else [])]
            command += ["--one", name, folder]
            env = os.environ | {
                "PYTHONWARNINGS": "ignore",
                "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]),
            }
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
            if done.returncode:  # one that does not fit is a result as well
                found["phases"].append({"phase": name, "failed": done.returncode})
                print(f"{name}: failed", flush=True)
            elif name == "base":
                found["machine"] = json.loads(done.stdout.splitlines()[-1])
            else:
                one = json.loads(done.stdout.splitlines()[-1])
                found["phases"].append(one)
                peaks = {
                    key: f"{one[key] / 2**30:.2f} GiB" for key in ("estimate", "allocated", "other", "reserved") if key in one
                }
                print(f"{name}: {one['seconds']} s, {peaks}, {one.get('trainable', 0):,} trainable", flush=True)
            args.out.write_text(json.dumps(found, indent=1) + "\n")
    if any("failed" in one for one in found["phases"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
