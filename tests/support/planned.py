"""The steps of a config by name, and which of them a change makes stale: for test_plan.py and test_fingerprint.py."""

import json
from pathlib import Path

from workflow_scripts.config.config import Config
from workflow_scripts.config.written import merge
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.plan.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
SFT = ["sft_v1", "sft_v2", "sft_v2.seed2"]
DPO = ["dpo", "dpo_ipo", "dpo_4bit", "dpo.seed2"]
OTHERS = ["kto", "ppo", "ppo_ifeval", "grpo", "grpo_numeric", "rloo"]
EVALUATIONS = ["generate_ifeval", "score_ifeval", "generate_gsm8k", "score_gsm8k"]


def config_over_a_local_file(tmp_path: Path) -> dict:
    """The default config over a local preference file of 20 rows, of which ten are taken; results go to a temporary folder."""
    rows = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = read_yaml(ROOT / "config/config.yaml")
    made["data"]["slices"]["pairs"] |= {"source": {"path": str(tmp_path / "mine.jsonl")}, "rows": 10, "heldout": 2}
    made["pathvars"]["results"] = str(tmp_path / "results")
    return made


def fingerprints(user: dict) -> dict[tuple[str, str], str]:
    """Of each step of a config, with two seeds of the main chain. `grpo` is trained with the reward model."""
    user = merge(user, {"experiments": {"grpo": {"reward": {"rm": 0.5, "ifeval": 0.5}}}})
    plan = Plan(Config(user))
    steps = [("slice", name) for name in plan.config.data["data"]["slices"]] + [("base", "base")]
    steps += [(kind, run) for kind in ("train", "merge", *EVALUATIONS) for run in SFT + DPO + OTHERS]
    steps += [(kind, "base") for kind in EVALUATIONS] + [("train", "rm"), ("eval_rm", "rm")]
    return {step: plan.fingerprint(*step) for step in steps}


def stale(before: dict, after: dict) -> set:
    return {step for step in before if before[step] != after[step]}


def runs(*names):
    return {(kind, name) for kind in ("train", "merge", *EVALUATIONS) for name in names}


def evals(*kinds):
    return {(kind, name) for kind in kinds for name in [*SFT, *DPO, *OTHERS, "base"]}


RM = {("train", "rm"), ("eval_rm", "rm")}
ALL_RUNS = runs(*SFT, *DPO, *OTHERS) | RM
EVALS = evals(*EVALUATIONS)
SLICES = {("slice", name) for name in ("sft", "pairs", "rm_pairs", "instructions", "sums")}
BELOW_BASE = {("base", "base")} | SLICES | ALL_RUNS | EVALS
EVERYTHING = BELOW_BASE | {("slice", "ifeval"), ("slice", "sums_eval")}
