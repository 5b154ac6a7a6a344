"""The tiny world in full: every method must move IFEval by far more than its noise, or a broken trainer would pass.

One seed of the default config; three with PHASELINE_TEST_ALL=1 (`make test-all`).
"""

import json
import os

import pytest

from tests.conftest import Clone, make_clone

SEEDS = (1, 2, 3) if os.environ.get("PHASELINE_TEST_ALL") else (1,)
METRIC = "prompt_level_strict_acc"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Clone:
    made = make_clone(tmp_path_factory.mktemp("tiny") / "phaseline")
    suffixes = ["" if seed == 1 else f".seed{seed}" for seed in SEEDS]
    runs = ["base", *(f"{name}{suffix}" for suffix in suffixes for name in ("sft_v2", "dpo"))]
    made.snakemake(*(f"results/ifeval_{run}.json" for run in runs), configs=[])
    return made


def scores(clone: Clone, run: str) -> dict:
    return json.loads((clone.folder / f"results/ifeval_{run}.json").read_text())


@pytest.mark.timeout(2400)
def test_the_base_follows_some_instructions_but_few(tiny):
    assert scores(tiny, "base")["n_prompts"] >= 300
    assert 0.14 <= scores(tiny, "base")[METRIC] <= 0.28


@pytest.mark.parametrize("seed", SEEDS)
def test_sft_gains_at_least_8_points_and_dpo_15_more(tiny, seed):
    suffix = "" if seed == 1 else f".seed{seed}"
    base, sft, dpo = (scores(tiny, run)[METRIC] for run in ("base", f"sft_v2{suffix}", f"dpo{suffix}"))
    assert sft >= base + 0.08
    assert dpo >= sft + 0.15


def test_training_moved_its_own_objective(tiny):
    sft, dpo = (json.loads((tiny.folder / f"results/{run}/adapter/manifest.json").read_text()) for run in ("sft_v2", "dpo"))
    assert sft["objective"]["after"]["loss"] < sft["objective"]["before"]["loss"]
    assert dpo["objective"]["after"]["accuracy"] > 0.8 and dpo["objective"]["after"]["margin"] > 0


def test_no_evaluation_prompt_is_in_any_training_slice(tiny):
    def rows(name: str) -> list[dict]:
        return [json.loads(line) for line in (tiny.folder / f"results/data/{name}.jsonl").read_text().splitlines()]

    prompts = {row["prompt"] for row in rows("ifeval")}
    sft = {row["messages"][0]["content"] for row in rows("sft")}
    pairs = {row["prompt"][0]["content"] for row in rows("pairs")}
    assert len(prompts) == len(rows("ifeval"))
    assert not prompts & sft and not prompts & pairs and not sft & pairs
