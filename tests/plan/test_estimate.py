"""What jobs ask of a scheduler: right within a factor of two of what steps took, from the config alone, more on a second try."""

import re
from pathlib import Path

import pytest

from workflow_scripts.config import config
from workflow_scripts.config.config import Config, load
from workflow_scripts.config.names import CHOICE
from workflow_scripts.config.written import merge
from workflow_scripts.plan import estimate
from workflow_scripts.plan.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
TINY, SMOLLM2 = ["config/config.yaml"], ["config/smollm2.yaml"]


def estimates(*overlays: dict, files=TINY) -> estimate.Estimates:
    data = load(*files).data
    for overlay in overlays:
        data = merge(data, overlay)
    return estimate.Estimates(Plan(Config(data)))


def measured(heading: str) -> list[tuple[str, str, float, float]]:
    """(kind, name, MiB, seconds) of the rows of a table in docs/performance.md: what run.json files of real runs say."""
    text = (ROOT / "docs/performance.md").read_text().split(heading)[1].split("\n\n")[1]
    rows = re.findall(r"^\| (\w+) \| (\w*) \| (\d+) \| ([\d.]+) \|", text, flags=re.M)
    assert len(rows) > 5
    return [(kind, name, float(mib), float(seconds)) for kind, name, mib, seconds in rows]


# What was cut in the run on a GPU that the table is of: fewer steps, shorter answers.
CUT = {
    "eval": {"ifeval": {"max_new_tokens": 256}},
    "methods": {"sft": {"train": {"max_steps": 40}}, "dpo": {"train": {"max_steps": 40}}, "kto": {"train": {"max_steps": 40}},
                "rm": {"train": {"max_steps": 60}}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("heading", "files", "overlays"),
    [("On two CPU cores", TINY, []), ("On one H100", SMOLLM2, [CUT])],
    ids=["tiny", "smollm2"],
)
def test_estimates_are_within_a_factor_of_two_of_what_was_measured(heading, files, overlays):
    made = estimates(*overlays, files=files)
    for kind, name, mib, seconds in measured(heading):
        found = made.of(kind, name)
        assert 0.5 < found["memory_mb"] / (mib * 1.048576) < 2, (kind, name, found)
        assert 0.5 < found["seconds"] / seconds < 2, (kind, name, found)
        asked = made.ask(kind, name, 1)
        assert asked["mem_mb"] > mib * 1.048576 and asked["runtime"] * 60 > seconds, (kind, name, asked)


def test_answers_behind_examples_need_what_was_measured():
    """Keys and values of whole prompts, and the logits of one token of each: not those of 2,000 tokens."""
    files = [*SMOLLM2, "config/smollm2_quick.yaml", "config/protocols/post_training_lab.yaml"]
    overlay = {"eval": {"tasks": {"lab_gsm8k": {"lm_eval": {"limit": 8}}}}, "generation": {"slots": 8}, "threads": 1}
    made = estimates(overlay, files=files)
    found = int(re.search(r"fp32\): ([\d,]+) MiB", (ROOT / "docs/performance.md").read_text())[1].replace(",", ""))
    assert 0.75 < made.of("own_lab_gsm8k", "base")["memory_mb"] / (found * 1.048576) < 1.33
    assert made.ask("own_lab_gsm8k", "base", 1)["mem_mb"] > found * 1.048576
    options = {"eval": {"tasks": {"arc": {"lm_eval": overlay["eval"]["tasks"]["lab_gsm8k"]["lm_eval"] | {
        "task": "arc_easy", "revision": "0" * 40, "num_fewshot": 8, "chat_template": False, "fewshot_as_multiturn": False,
        "system": None}, "metric": "acc"}}}}  # fmt: skip
    assert estimates(overlay, options, files=files).ask("own_arc", "base", 1)["mem_mb"] < 8000


def test_a_second_attempt_asks_for_more_and_the_config_says_how_much():
    made = estimates()
    first, second = (made.ask("train", "dpo", attempt) for attempt in (1, 2))
    assert second["mem_mb"] == pytest.approx(2 * first["mem_mb"], abs=100)
    assert second["runtime"] == pytest.approx(2 * first["runtime"], abs=1) and second["disk_mb"] == first["disk_mb"]
    generous = estimates({"requests": {"memory": 3.0, "time": 30.0, "minutes": 60}}).ask("train", "dpo", 1)
    assert generous["mem_mb"] == pytest.approx(2 * first["mem_mb"], abs=100)
    seconds = made.of("train", "dpo")["seconds"]
    assert generous["runtime"] == pytest.approx(60 + 30 * seconds / 60, abs=1)


def test_seeds_of_an_experiment_ask_for_the_same():
    made = estimates()
    assert made.ask("train", "dpo.seed3", 1) == made.ask("train", "dpo", 1)


@pytest.mark.parametrize(
    ("kind", "name", "overlay"),
    [
        ("train", "sft_v2", {"data": {"slices": {"sft": {"rows": 24000}}}}),
        ("train", "dpo", {"methods": {"dpo": {"train": {"num_train_epochs": 4}}}}),
        ("train", "ppo", {"methods": {"ppo": {"train": {"max_completion_length": 256}}}}),
        ("train", "grpo", {"methods": {"grpo": {"train": {"max_steps": 80}}}}),
        ("generate_ifeval", "dpo", {"eval": {"ifeval": {"max_new_tokens": 256}}}),
        ("generate_ifeval", "dpo", {"generation": {"slots": 10}}),
        ("generate_ifeval", "dpo", {"generation": {"backend": "hf"}, "eval": {"batch_size": 10}}),
        ("score_ifeval", "dpo", {"data": {"slices": {"ifeval": {"rows": 4000}}}}),
    ],
)
def test_more_work_takes_longer(kind, name, overlay):
    assert estimates(overlay).of(kind, name)["seconds"] > 1.5 * estimates().of(kind, name)["seconds"]


def test_a_larger_model_takes_more_of_everything():
    shape = {"parameters": 7_600_000_000, "hidden_size": 3584, "num_hidden_layers": 28, "vocab_size": 152064}
    small, large = estimates(files=SMOLLM2), estimates({"base": {"shape": shape}}, files=SMOLLM2)
    for kind, name in (("base", "base"), ("merge", "sft_v2"), ("train", "dpo"), ("generate_ifeval", "dpo"), ("eval_rm", "rm")):
        for key in ("memory_mb", "disk_mb"):
            assert large.of(kind, name)[key] >= small.of(kind, name)[key], (kind, key)
        assert large.of(kind, name)["memory_mb"] > 3 * small.of(kind, name)["memory_mb"], kind


def test_a_larger_rank_takes_more_memory_and_disk_and_a_smaller_one_no_less_than_was_measured():
    made = estimate.Estimates(Plan(load(*SMOLLM2, "config/rank_sweep.yaml")))
    small, same, large = (made.of("train", name) for name in ("dpo_r8", "dpo", "dpo_r32"))
    assert small == same and large["seconds"] == same["seconds"]
    assert large["disk_mb"] > 1.9 * same["disk_mb"] and large["memory_mb"] > same["memory_mb"] + 16 * 4.9  # 4.9 M weights more


def test_the_shape_of_the_tiny_model_is_counted_from_the_config():
    assert estimates().parameters == pytest.approx(904_448, rel=0.1)  # what its file holds: the tokenizer has 905 tokens of 960


def test_a_model_from_elsewhere_without_a_shape_counts_as_one_of_one_and_a_half_billion():
    data = load(*SMOLLM2).data
    del data["base"]["shape"]
    assert estimate.Estimates(Plan(Config(data))).parameters == 1.5e9


def test_every_step_of_every_shipped_config_has_an_estimate():
    study = ["config/qwen05b.yaml"]
    for files in (
        TINY,
        SMOLLM2,
        [*SMOLLM2, "config/smollm2_quick.yaml"],
        [*study, "config/rank_sweep.yaml"],
        [*study, "config/qwen7b.yaml"],
    ):
        made = estimate.Estimates(Plan(config.load(*files)))
        slices = [("slice", name) for name in made.config.data["data"]["slices"]]
        runs = [(kind, name) for name, body in made.config.experiments.items() for kind in kinds(made, body)]
        for kind, name in [("base", "base"), ("generate_ifeval", "base"), *slices, *runs]:
            asked = made.ask(kind, name, 1)
            assert all(isinstance(value, int) and value > 0 for value in asked.values()), (kind, name, asked)


def kinds(made: estimate.Estimates, body: dict) -> list[str]:
    if body["method"] == "rm":
        return ["train", "merge", "eval_rm"]
    verbs = {task: ("choice",) if task in CHOICE else ("generate", "score") for task in made.config.evaluations}
    return ["train", "merge", *(f"{verb}_{task}" for task in verbs for verb in verbs[task])]
