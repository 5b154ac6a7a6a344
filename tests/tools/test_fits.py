"""What the tool says fits, does; its advice makes the rest fit, and keeps what makes experiments comparable."""

import json
import re
import subprocess
import sys

import pytest

from tests.support.shapes import LARGE, ROOT, STUDY, memory, peaks
from workflow_scripts.config.config import Config, load
from workflow_scripts.config.written import merge
from workflow_scripts.plan import gpu_memory
from workflow_scripts.plan.gpu_memory import Memory
from workflow_scripts.plan.plan import Plan
from workflow_scripts.tools import fits


def tool(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "workflow_scripts.tools.fits", *args], cwd=ROOT, capture_output=True, text=True)


def test_the_study_fits_on_16_gb_and_a_7b_base_does_not_everywhere():
    done = tool("--configfile", *STUDY, "--gpu", "16")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^train sft_v2 +[12]\.\d +step +yes$", done.stdout, flags=re.M)
    assert re.search(r"^disk: \d+\.\d GB \(merged ", done.stdout, flags=re.M)
    done = tool("--configfile", *LARGE, "--gpu", "16")
    assert done.returncode == 1 and "train dpo_4bit" in done.stdout
    more = r"; or gpus: 2, shard: true; then \d+\.\d GiB on each$"
    assert re.search(r"^16 GB: train dpo, .*: quantise: nf4; then \d\.\d GiB" + more, done.stdout, flags=re.M)
    assert re.search(
        r"^16 GB: generate ifeval, generate gsm8k, .*: answers: no key makes it fit; it needs 24 GB$",
        done.stdout,
        flags=re.M,
    )


def test_json_is_the_same_and_a_card_of_nothing_is_refused():
    found = json.loads(tool("--configfile", *STUDY, "--json").stdout)
    sft = next(one for one in found["phases"] if one["phase"] == "train sft_v2")
    assert sft["trainable"] == 8_798_208 and sft["fits"] == [16, 24, 40, 80, 141] and sft["peak"] == max(sft["stages"].values())
    assert tool("--gpu", "0").returncode == 2


BATCH = {"per_device_train_batch_size": 64, "gradient_checkpointing": False, "gradient_accumulation_steps": 1}
WIDE = {"methods": {name: {"train": BATCH} for name in ("sft", "dpo", "kto", "rm")}}


def test_advice_makes_it_fit_and_keeps_the_effective_batch():
    made = memory(WIDE)
    for name in ("sft_v2", "dpo", "rm"):
        body = made.config.experiments[name]
        before = made.train(name, body)
        changes, peak = fits.remedy(made, before, 16)
        assert not gpu_memory.fits(before.peak, 16) and gpu_memory.fits(peak, 16)
        after = memory(
            WIDE, {"experiments": {name: {"train": {key.removeprefix("train."): value for key, value in changes.items()}}}}
        )
        train = after.config.experiments[name]["train"]
        assert peaks(after)[f"train {name}"] == peak
        assert (
            train["gradient_checkpointing"] and train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] == 64
        )


def test_advice_halves_ktos_micro_batch_down_to_a_group_of_its_kl_estimate():
    more = {"methods": {"kto": {"kl_rows": 256, "train": {"per_device_train_batch_size": 512}}}}
    made = memory(WIDE, more)
    changes, peak = fits.remedy(made, made.train("kto", made.config.experiments["kto"]), 80)
    assert changes["train.per_device_train_batch_size"] == 256 and peak < 80e9


def test_advice_leaves_ktos_micro_batch_alone():
    made = memory(WIDE, {"methods": {"kto": {"kl_rows": "micro_batch", "train": {"per_device_train_batch_size": 512}}}})
    kto = made.train("kto", made.config.experiments["kto"])
    assert fits.remedy(made, kto, 16) is None
    (line,) = fits.advice(made, [kto], 16)
    assert line.startswith("train kto: step: no key makes it fit; it needs ")


def test_advice_on_rollouts_draws_groups_in_turn_and_then_shortens_prompts():
    made = memory(files=LARGE)
    phases = {f"{phase.kind} {phase.name}": phase for phase in made.phases()}
    changes, _ = fits.remedy(made, phases["train grpo"], 16)
    assert changes == {"train.steps_per_generation": 4}
    changes, _ = fits.remedy(made, phases["train ppo"], 24)
    assert list(changes) == ["data.slices.prompts.max_prompt_tokens"]


def test_disk_counts_every_seed():
    def total(seeds):
        plan = Plan(Config(merge(load(ROOT / STUDY[0]).data, {"seeds": seeds})))
        return fits.disk(plan, Memory(plan.config))

    one, three = total([1]), total([1, 2, 3])
    assert one["merged"] == pytest.approx(4 * 494_032_768 / 1e9) and three["merged"] == pytest.approx(3 * one["merged"])
    assert three["adapters"] == pytest.approx(3 * 22 * 4 * 8_798_208 / 1e9) and one["base"] == three["base"]
