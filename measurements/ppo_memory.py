"""Peak memory of a training step of PPO (with a reward model) and of SFT, at the shape of Qwen2.5-0.5B with random weights.

    python measurements/ppo_memory.py --device cuda --rows 4 --length 1024

Both train the constant block on NF4 with activation checkpointing, as the study does, on sequences of the same length. A process
each; what counts are the steps from the second on, when the optimiser has its state. On CUDA, memory that torch has allocated;
on a CPU (where NF4 computes in fp32), the process's resident memory, sampled. A rollout is a part of the step that needs it.

    python measurements/ppo_memory.py --device cuda --rows 4 --length 1024 --trl DIR --measure trl_full trl_lora

measures TRL 1.12's PPO trainer beside SFT, the last one of TRL's (`pip install --no-deps --target DIR trl==1.12.0`): policy,
value, reward and, unless the policy is a LoRA, reference are models of their own in bf16, as in its examples.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SHAPE = {
    "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "intermediate_size": 4864, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
TRL = ("trl_full", "trl_lora")
PEAKS: list[dict] = []


def write_base(folder: Path) -> Path:
    """494,032,768 random weights, with the tiny world's tokenizer: few of the 151,936 tokens occur, all have a logit."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.support import small_steps
    from workflow_scripts.artifacts import manifests
    from workflow_scripts.models import chat

    tokenizer = chat.tokenizer_of(manifests.read(small_steps.write_base(folder / "tiny")))
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    assert model.num_parameters() == 494_032_768
    model.to(torch.bfloat16).save_pretrained(folder / "base", max_shard_size="1000GB")
    tokenizer.save_pretrained(folder / "base")
    names = sorted(path.name for path in (folder / "base").iterdir())
    return small_steps.write_manifest(folder / "base/manifest.json", "base", "random weights", names)


def watch(trainer_class, device: str) -> None:
    """Note the peak of each training step of a trainer class."""
    import torch

    real = trainer_class.training_step

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def training_step(self, *args, **kwargs):
        rollout = hasattr(self, "ppo") and self._step % 4 == 0  # two micro-batches, two epochs
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            found = real(self, *args, **kwargs)
            peak = torch.cuda.max_memory_allocated()
        else:
            seen, over = [resident()], threading.Event()
            sampler = threading.Thread(target=lambda: [seen.append(resident()) for _ in iter(lambda: over.wait(0.005), True)])
            sampler.start()
            found = real(self, *args, **kwargs)
            over.set()
            sampler.join()
            peak = max(seen)
        PEAKS.append({"rollout": rollout, "bytes": peak})
        return found

    trainer_class.training_step = training_step


def train(experiment: str, folder: Path, device: str, rows: int, length: int) -> None:
    from trl import SFTTrainer

    from tests.support import small_steps
    from workflow_scripts.rl.ppo_trainer import PPOTrainer
    from workflow_scripts.tiny import world

    base = folder / "base/manifest.json"
    more = {"per_device_train_batch_size": rows, "per_device_eval_batch_size": 1, "gradient_checkpointing": True}
    parents = {"start": base}
    if experiment == "sft_v2":
        long = [{"role": "user", "content": "go on"}, {"role": "assistant", "content": "one two three " * length}]
        parents["rows"] = small_steps.write_slice(folder / "data", "sft", [{"messages": long}] * (4 * rows + 1), heldout=1)
        more |= {"max_length": length, "max_steps": 4, "gradient_accumulation_steps": 1}
    else:
        pairs = world.preference_rows(4 * rows + 8, seed=1)
        data = small_steps.write_slice(folder / "data", "pairs", pairs, heldout=1)
        rm = small_steps.train_config("rm", max_steps=1, per_device_train_batch_size=1, optim=optimiser(device))
        run(folder / "rm", "train_rm", parents | {"rows": data}, rm, device)
        parents |= {"start of rm": base, "reward rm": folder / "rm/adapter/manifest.json", "rows": data}
        more |= {"max_completion_length": length - 64, "max_steps": 8, "steps_per_generation": 2, "num_iterations": 2}
        more |= {"require_reward_above_chance": False}
    watch(SFTTrainer if experiment == "sft_v2" else PPOTrainer, device)
    config = small_steps.train_config(experiment, optim=optimiser(device), **more)
    run(folder / experiment, f"train_{config['method']}", parents, config, device)
    print(json.dumps(PEAKS))


def train_trl(lora: bool, folder: Path, device: str, rows: int, length: int) -> None:
    """TRL 1.12's PPO: one micro-batch a rollout, two epochs, two rollouts."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    from workflow_scripts.artifacts import manifests
    from workflow_scripts.config.yaml_files import read_yaml
    from workflow_scripts.models import chat

    base = folder / "base"
    tokenizer = chat.tokenizer_of(manifests.read(base / "manifest.json"))
    tokenizer.padding_side = "left"
    more = {"dtype": torch.bfloat16}
    models = [AutoModelForCausalLM.from_pretrained(base, **more) for _ in range(1 if lora else 2)]
    scorers = [AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, **more) for _ in range(2)]
    block = read_yaml(Path("config/methods.yaml"))["lora"]
    adapter = LoraConfig(
        r=block["r"], lora_alpha=block["alpha"], lora_dropout=0.0, target_modules=block["target_modules"], task_type="CAUSAL_LM"
    )
    ids = tokenizer("go on " * 64)["input_ids"][:64]
    config = PPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=rows, gradient_accumulation_steps=1, num_mini_batches=1,
        num_ppo_epochs=2, total_episodes=2 * rows, response_length=length - 64, local_rollout_forward_batch_size=rows,
        gradient_checkpointing=True, bf16=device == "cuda", use_cpu=device == "cpu", report_to="none", save_strategy="no",
        num_sample_generations=0,
    )  # fmt: skip
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=models[0], ref_model=None if lora else models[1],
        reward_model=scorers[0], value_model=scorers[1], train_dataset=Dataset.from_list([{"input_ids": ids}] * 8 * rows),
        eval_dataset=Dataset.from_list([{"input_ids": ids}] * rows), peft_config=adapter if lora else None,
    )  # fmt: skip
    forward, backward = ppo_trainer.PolicyAndValueWrapper.forward, trainer.accelerator.backward
    peak = torch.cuda.max_memory_allocated if device == "cuda" else lambda: 0
    reset = torch.cuda.reset_peak_memory_stats if device == "cuda" else lambda: None

    def update_begins(self, **kwargs):
        if torch.is_grad_enabled():
            PEAKS.append({"rollout": True, "bytes": peak()})  # since the last update
            reset()
        return forward(self, **kwargs)

    def update_ends(loss, **kwargs):
        backward(loss, **kwargs)
        PEAKS.append({"rollout": False, "bytes": peak()})
        reset()

    ppo_trainer.PolicyAndValueWrapper.forward = update_begins
    trainer.accelerator.backward = update_ends
    trainer.train()
    print(json.dumps(PEAKS[3:]))  # the optimiser has its state from the second update on


def optimiser(device: str) -> str:
    return "paged_adamw_32bit" if device == "cuda" else "adamw_torch"


def run(out: Path, step: str, parents: dict[str, Path], config: dict, device: str) -> None:
    from tests.support import small_steps

    job = small_steps.job(step, out / "adapter/manifest.json", parents, config)
    job.step |= {"device": device, "precision": "bf16" if device == "cuda" else "fp32", "threads": os.cpu_count()}
    small_steps.run(job)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--rows", type=int, default=4, help="sequences in a micro-batch")
    made.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    made.add_argument("--trl", metavar="DIR", help="a folder with TRL 1.12, to measure its trainer as well")
    made.add_argument("--measure", nargs="+", choices=["ppo", *TRL], default=["ppo"], help="what to measure beside SFT")
    made.add_argument("--one", nargs=2, metavar=("EXPERIMENT", "FOLDER"), help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.one:
        experiment, folder = args.one[0], Path(args.one[1])
        if experiment in TRL:
            train_trl(experiment == "trl_lora", folder, args.device, args.rows, args.length)
        else:
            train(experiment, folder, args.device, args.rows, args.length)
        return
    with tempfile.TemporaryDirectory(prefix="ppo_memory.") as folder:
        write_base(Path(folder))
        peaks = {}
        for experiment in ("sft_v2", *args.measure):
            started = time.monotonic()
            command = [sys.executable, __file__, "--device", args.device, "--rows", str(args.rows), "--length", str(args.length)]
            paths = [os.getcwd(), *filter(None, [args.trl if experiment in TRL else "", os.environ.get("PYTHONPATH", "")])]
            # Freed memory goes back at once, so that what is resident is what is in use.
            env = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
            env["PYTHONPATH"] = os.pathsep.join(paths)
            done = subprocess.run([*command, "--one", experiment, folder], env=env, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])[1:]
            for kind in sorted({one["rollout"] for one in found}):
                peak = max(one["bytes"] for one in found if one["rollout"] == kind)
                peaks[experiment, kind] = peak
                what = f"{experiment}{', with a rollout' if kind else ''}"
                print(f"{what:24}{peak / 2**30:7.2f} GiB  {peak / peaks['sft_v2', False]:5.2f} x SFT", flush=True)
            print(f"{experiment}: {time.monotonic() - started:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
