"""The tiny world in full: every method must move IFEval by far more than its noise, or a broken trainer would pass.

One seed, from the base in tests/files/tiny_base. In `make test-all` the default config itself too, from nothing, three seeds.
"""

import json

import pytest

from tests.conftest import Clone, run_world
from tests.support.gains import PREFERENCES, ROLLOUTS, suffix

METRIC = "prompt_level_strict_acc"
SEEDS = (1, 2, 3)


pytestmark = pytest.mark.timeout(3 * 3600)  # two slow cores, and three seeds


@pytest.fixture(scope="session")
def scratch(shared) -> Clone:
    """The default config with three seeds."""
    return run_world(shared, "scratch", SEEDS, configs=[])


@pytest.fixture(params=["world", pytest.param("scratch", marks=pytest.mark.long)])
def tiny(request) -> Clone:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=[("world", 1), *(pytest.param(("scratch", seed), marks=pytest.mark.long) for seed in SEEDS)], ids=str)
def case(request) -> tuple[Clone, str]:
    """(a clone, what the names of its runs end with)."""
    clone, seed = request.param
    return request.getfixturevalue(clone), suffix(seed)


def scores(clone: Clone, run: str, task: str = "ifeval") -> dict:
    return json.loads((clone.folder / f"results/{task}_{run}.json").read_text())


def objective(clone: Clone, run: str) -> tuple[dict, dict]:
    found = json.loads((clone.folder / f"results/{run}/adapter/manifest.json").read_text())["objective"]
    return found["before"], found["after"]


def test_the_base_follows_some_instructions_but_few(tiny):
    assert scores(tiny, "base")["n_prompts"] >= 300
    assert 0.14 <= scores(tiny, "base")[METRIC] <= 0.28


def test_sft_gains_at_least_8_points_and_each_method_15_more(case):
    tiny, end = case
    base, sft = (scores(tiny, run)[METRIC] for run in ("base", f"sft_v2{end}"))
    found = {name: scores(tiny, f"{name}{end}")[METRIC] for name in (*PREFERENCES, *ROLLOUTS)}
    print(f"base {base:.4f}, sft_v2 {sft:.4f}, {found}")
    assert sft >= base + 0.08
    assert min(found.values()) >= sft + 0.15, found


def test_grpo_on_sums_gains_at_least_30_points_of_exact_match(case):
    tiny, end = case
    sft, grpo = (scores(tiny, f"{name}{end}", "gsm8k") for name in ("sft_v2", "grpo_numeric"))
    print(f"sft_v2{end} {sft['exact_match']:.3f}, grpo_numeric {grpo['exact_match']:.3f}")
    assert sft["n_prompts"] >= 200
    assert grpo["exact_match"] >= sft["exact_match"] + 0.30


def test_the_reward_model_orders_at_least_80_percent_of_the_held_out_pairs(case):
    tiny, end = case
    report = json.loads((tiny.folder / f"results/rm{end}/rm_eval.json").read_text())
    print(f"rm{end}: {report['accuracy']:.3f}, longer is chosen {report['length']['longer_is_chosen']:.3f}")
    assert report["n_pairs"] >= 150
    assert report["accuracy"] >= 0.80
    assert report["length"]["longer_is_chosen"] < 0.65  # not a matter of length


def test_training_moved_its_own_objective(tiny):
    for run, key, gain in (
        ("dpo", "accuracy", 0.3), ("kto", "margin", 0.3), ("rm", "accuracy", 0.2),
        ("ppo", "rm", 1.0), ("ppo_ifeval", "reward", 0.2), ("grpo", "reward", 0.2), ("rloo", "reward", 0.2),
        ("grpo_numeric", "numeric", 0.1),
    ):  # fmt: skip
        before, after = objective(tiny, run)
        assert after[key] >= before[key] + gain, (run, before, after)
    for run in ("sft_v2", "kto", "rm"):
        before, after = objective(tiny, run)
        assert after["loss"] < before["loss"]


def test_no_evaluation_prompt_is_in_any_training_slice(tiny):
    def rows(name: str) -> list[dict]:
        return [json.loads(line) for line in (tiny.folder / f"results/data/{name}.jsonl").read_text().splitlines()]

    prompts = {row["prompt"] for row in rows("ifeval")}
    sft = {row["messages"][0]["content"] for row in rows("sft")}
    pairs = {row["prompt"][0]["content"] for row in rows("pairs")}
    assert len(prompts) == len(rows("ifeval"))
    assert not prompts & sft and not prompts & pairs and not sft & pairs
    learned = {row["prompt"][0]["content"] for row in rows("rm_pairs")} | {row["prompt"] for row in rows("instructions")}
    assert not prompts & learned and not sft & learned
    sums, held = ({row["prompt"][0]["content"] for row in rows(name)} for name in ("sums", "sums_eval"))
    assert not sums & held and not sft & sums and not sft & held
