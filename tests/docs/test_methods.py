"""docs/methods.md says what the config says."""

import re

import pytest
import yaml

from tests.conftest import ROOT

PAGE = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
SHIPPED = yaml.safe_load((ROOT / "config/methods.yaml").read_text(encoding="utf-8"))
SECTION = PAGE[PAGE.index("## Departures from the published recipes") :]
DEPARTURES = dict(part.split("\n", 1) for part in SECTION.split("\n### ")[1:])
HEADINGS = {
    "SFT": "sft",
    "DPO": "dpo",
    "SimPO": "simpo",
    "CPO": "cpo",
    "ORPO": "orpo",
    "KTO": "kto",
    "Reward model": "rm",
    "PPO": "ppo",
    "GRPO": "grpo",
    "RLOO": "rloo",
}


@pytest.mark.parametrize(("heading", "method"), HEADINGS.items())
def test_what_the_table_of_departures_says_of_a_method_is_what_is_shipped(heading, method):
    block = SHIPPED["methods"][method]
    settings = {**block, **block["train"], **block.get("ppo", {})}
    said = re.findall(r"`(\w+): ([^`]+)`", DEPARTURES[heading])
    assert "learning_rate" in dict(said) and len(said) > 1
    assert {key: yaml.safe_load(value) for key, value in said} == {key: settings[key] for key, _ in said}


def test_the_table_of_what_is_common_says_what_is_shipped():
    table, lora = DEPARTURES["All methods"], SHIPPED["lora"]
    assert f"r {lora['r']}, alpha {lora['alpha']}, dropout {lora['dropout']} |" in table
    train = {name: block["train"] for name, block in SHIPPED["methods"].items()}
    sampled = {train[name]["learning_rate"] for name in ("dpo", "simpo", "cpo", "orpo", "kto", "ppo", "grpo", "rloo")}
    assert sampled == {5e-6} and "5e-6 for DPO, KTO, PPO, GRPO and RLOO, and for SimPO, CPO and ORPO" in table
    common = {(t["lr_scheduler_type"], t["warmup_steps"], t["num_train_epochs"], t["max_grad_norm"]) for t in train.values()}
    assert common == {("cosine", 0.03, 1, 1.0)} and "cosine to 0, warm-up 3 %, 1 epoch" in table
    full = {name for name, block in SHIPPED["methods"].items() if block["quantise"] == "none"}
    assert full == {"dpo"} and "NF4 for all but DPO" in table


def test_the_numbers_of_steps_and_answers_are_those_of_the_study():
    slices = yaml.safe_load((ROOT / "config/qwen05b.yaml").read_text(encoding="utf-8"))["data"]["slices"]
    rows = {name: one["rows"] - one.get("heldout", 0) for name, one in slices.items()}
    train = {name: block["train"] for name, block in SHIPPED["methods"].items()}

    def batch(method: str) -> int:
        return train[method]["per_device_train_batch_size"] * train[method]["gradient_accumulation_steps"]

    steps = {
        "sft": rows["sft"] / batch("sft"),
        "dpo": rows["pairs"] / batch("dpo"),
        "rm": rows["pairs"] / batch("rm"),
        "kto": 2 * rows["pairs"] / batch("kto"),
        "ppo": train["ppo"]["num_iterations"] * rows["prompts"] / batch("ppo"),
        "grpo": train["grpo"]["num_generations"] * rows["prompts"] / batch("grpo"),
        "rloo": train["rloo"]["num_generations"] * rows["gsm8k_train"] / batch("rloo"),
    }
    said = re.search(r"about (\d+) steps of SFT, DPO and reward model, (\d+) of KTO, (\d+) of PPO, (\d+) of GRPO and RLOO", PAGE)
    assert said is not None
    one, kto, ppo, groups = map(int, said.groups())
    assert {name: round(count + 0.01) for name, count in steps.items()} == {
        "sft": one, "dpo": one, "rm": one, "kto": kto, "ppo": ppo, "grpo": groups, "rloo": groups,
    }  # fmt: skip
    answers = [rows["prompts"] * n for n in (1, train["grpo"]["num_generations"])]
    assert "PPO draws {:,} answers, GRPO and RLOO {:,}".format(*answers) in PAGE


def test_the_page_speaks_of_the_trl_that_is_locked():
    locked = re.search(r"^trl==(\d+\.\d+)", (ROOT / "envs/requirements.lock").read_text(encoding="utf-8"), flags=re.M)
    assert locked is not None and f"TRL {locked[1]} by default" in PAGE and f"### Where TRL {locked[1]} says nothing" in PAGE
