"""Estimates of GPU memory are within 20 % of what was measured, and what asks for more is estimated higher."""

import json
import re

import pytest

from tests.support.shapes import LARGE, ROOT, SEVEN, STUDY, memory, peaks
from workflow_scripts.config.names import CHOICE
from workflow_scripts.generation.answers import ROWS, rows_for
from workflow_scripts.plan import passes
from workflow_scripts.plan.gpu_memory import GIB, Memory
from workflow_scripts.plan.passes import Pass, in_slots
from workflow_scripts.plan.shape import weights


def measured() -> list[tuple[str, float, float, float]]:
    """(what, estimate, measured, ratio) of the table in docs/performance.md."""
    text = (ROOT / "docs/performance.md").read_text().split("## What fits on which GPU")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, flags=re.M)
    assert len(rows) == 8
    return [(what.strip(), float(estimate), float(found), float(ratio)) for what, estimate, found, ratio in rows]


def estimated() -> dict[str, float]:
    """The estimates of that table, in GiB. Tokens as they were there: rows of 1,024, but 12,640 tokens without padding in two."""
    made = memory()
    shape, adapter = made.shape, made.adapter

    def at(nf4: bool, step: float, state: int = 16, adapters: int = 1) -> float:
        return (weights(shape, 2, nf4, True) + (state * adapters + 2) * adapter + step) / GIB

    def how(nf4: bool, dropout: bool, masked: bool = True, plain: bool = False) -> Pass:
        return Pass(shape, SEVEN, 16, 2, dropout, copies=plain or not nf4, autocast=not plain, masked=masked)

    def step(nf4: bool, dropout: bool, tokens: int, row: int, checkpointing: bool, scored: float, **more) -> float:
        return passes.step(how(nf4, dropout, **more), tokens, row, checkpointing, scored)

    answers = 12640 * 0.55  # of SFT's tokens
    pairs = 18000  # completion tokens of 32 rows; the tile is full from 4,096 on
    full = {"masked": False}
    return {
        "SFT, NF4, checkpointing, 4 x 4, 8-bit AdamW": at(True, step(True, True, 4096, 1024, True, answers / 4), 10),
        "SFT, NF4, no checkpointing, 16 x 1, no padding": at(True, step(True, True, 12640, 789, False, answers, **full)),
        "SFT, bf16, no checkpointing, 16 x 1, no padding": at(False, step(False, True, 12640, 789, False, answers, **full)),
        "DPO, bf16, checkpointing, 2 x 8": at(False, step(False, False, 4096, 1024, True, pairs / 8)),
        "DPO, bf16, no checkpointing, 16 x 1": at(False, step(False, False, 32768, 1024, False, pairs)),
        "DPO, NF4, no checkpointing, 16 x 1": at(True, step(True, False, 32768, 1024, False, pairs)),
        "SFT, NF4, checkpointing, 4 x 1,024 tokens": at(True, step(True, True, 4096, 1024, True, 4096, **full)),
        "PPO with a reward model, the same": at(
            True, step(True, False, 4096, 1024, True, 0, plain=True) + 4 * adapter, adapters=2
        ),
    }


def test_estimates_are_within_20_percent_of_what_was_measured_and_the_page_says_so():
    made, shown = estimated(), measured()
    assert {what for what, *_ in shown} == set(made)
    for what, estimate, found, ratio in shown:
        assert made[what] == pytest.approx(estimate, rel=0.01), what
        assert ratio == pytest.approx(estimate / found, abs=0.01), what
        assert 0.8 < ratio < 1.2, what


def test_the_phases_of_the_study_are_within_20_percent_of_what_was_measured_at_its_shape():
    """measurements/study_memory.py's own settings."""
    from measurements.study_memory import configured

    text = (ROOT / "docs/performance.md").read_text()
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) B \| [\w ]+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| [\d.]+ \|$", text, flags=re.M)
    assert len(rows) == 17
    made = {name: Memory(configured(shape, False, 1024, "hf")) for name, shape in (("0.5", "05b"), ("7", "7b"))}
    for name, shape, estimate, found, ratio in rows:
        one = made[shape]
        body = one.config.experiments[name.removeprefix("eval_")]
        phase = (one.eval_rm if name == "eval_rm" else one.train)(name, body)
        assert phase.peak / GIB == pytest.approx(float(estimate), abs=0.006), (name, shape)
        assert float(ratio) == pytest.approx(float(estimate) / float(found), abs=0.015), (name, shape)
        assert 0.8 < float(ratio) < 1.2, (name, shape)


@pytest.mark.parametrize(
    ("what", "slots", "length", "sampled", "peak"),
    [  # docs/generation.md: 0.5 B, fixed, mixed, sampled; 7 B, fixed, mixed
        ("0.5", 384, 96 + 256, False, 3.06),
        ("0.5", 384, 400 + 1280, False, 8.75),
        ("0.5", 384, 96 + 256, True, 3.23),
        ("7", 384, 96 + 256, False, 22.73),
        ("7", 384, 400 + 1280, False, 49.09),
    ],
)
def test_the_generators_memory_is_within_10_percent_of_what_was_measured(what, slots, length, sampled, peak):
    made = memory({"lora": {"r": 16, "alpha": 32}}, files=STUDY if what == "0.5" else LARGE)
    how, fixed = made._judged()
    assert (fixed + in_slots(how, slots, length, sampled, 16, ROWS)) / GIB == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    ("phase", "overlay"),
    [
        ("train sft_v2", {"methods": {"sft": {"train": {"per_device_train_batch_size": 16}}}}),
        ("train sft_v2", {"methods": {"sft": {"train": {"gradient_checkpointing": False}}}}),
        ("train sft_v2", {"methods": {"sft": {"quantise": "none"}}}),
        ("train dpo", {"methods": {"dpo": {"train": {"max_length": 4096}}}}),
        ("train kto", {"methods": {"kto": {"train": {"per_device_eval_batch_size": 16}}}}),
        ("train ppo", {"methods": {"ppo": {"train": {"steps_per_generation": 16}}}}),
        ("train grpo", {"experiments": {"grpo": {"reward": "rm"}}}),
        ("train grpo", {"data": {"slices": {"gsm8k_train": {"max_prompt_tokens": 4000}}}}),
        ("generate ifeval", {"generation": {"backend": "hf"}, "eval": {"batch_size": 300}}),
        ("train grpo", {"generation": {"rollouts": "hf"}, "methods": {"grpo": {"train": {"steps_per_generation": 64}}}}),
        ("generate gsm8k", {"eval": {"gsm8k": {"max_new_tokens": 4096}}}),
        ("eval_rm rm", {"methods": {"rm": {"train": {"per_device_eval_batch_size": 64}}}}),
    ],
)
def test_what_asks_for_more_memory_is_estimated_higher(phase, overlay):
    assert peaks(memory(overlay))[phase] > 1.05 * peaks(memory())[phase]


def test_a_base_that_is_dequantised_is_counted_once_with_the_generator_that_shares_it():
    off, made = memory({"speed": {"dequantised": False}}), memory()
    more = {name: (made.train(name, body).stages, off.train(name, body).stages) for name, body in made.config.experiments.items()}
    wider = made.shape.linear * (2 - 0.5)  # a 4-bit weight and its constants take a little more than half a byte
    new, old = more["sft_v2"]
    assert new["step"] - old["step"] == pytest.approx(wider, rel=0.05)
    assert more["dpo"][0] == more["dpo"][1]  # was never in 4 bits
    saved = made.shape.linear * 0.5
    assert more["grpo"][1]["rollout"] - more["grpo"][0]["rollout"] == pytest.approx(saved, rel=0.2)


def test_a_rollout_has_as_many_rows_as_answers_and_no_more():
    assert [rows_for(answers) for answers in (1, 64, 65, 384, 500)] == [64, 64, 128, 384, 384]
    made = memory({"methods": {"grpo": {"train": {"per_device_eval_batch_size": 200}}}})
    body = made.config.experiments["grpo"]
    peak = made.train("grpo", body).stages["rollout"]
    wider = {"train": body["train"] | {"gradient_accumulation_steps": 32}}  # 256 answers
    assert made.train("grpo", body | wider).stages["rollout"] - peak > (256 - 64) * made.shape.vocabulary * (3 * 2 + 4)
    fewer = body["train"] | {"per_device_eval_batch_size": 64}
    assert made.train("grpo", body | {"train": fewer}).stages["rollout"] == pytest.approx(peak, rel=1e-6)


def test_the_effective_batch_at_once_is_within_15_percent_of_what_was_measured():
    """Rows up to the limit but not all: the estimate is for the longest."""
    found = json.loads((ROOT / "measurements/training_h200.json").read_text())["runs"]
    for name, method in (("sft_v2", "sft"), ("rm", "rm")):
        (peak,) = [run["peak_gib"] for run in found if (run["phase"], run["way"]) == (name, "at once")]
        train = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "gradient_checkpointing": False}
        made = memory({"speed": {"dequantised": False}, "methods": {method: {"train": train | {"max_length": 1024}}}})
        assert made.train(name, made.config.experiments[name]).stages["step"] / GIB == pytest.approx(peak, rel=0.15), name


def test_every_shipped_config_has_a_line_for_each_phase():
    for files in (["config/config.yaml"], ["config/smollm2.yaml"], STUDY, LARGE):
        made = memory(files=files)
        trained = {f"train {name}" for name in made.config.experiments}
        tasks = made.config.evaluations
        asked = {f"{'choose' if task in CHOICE else 'generate'} {task}" for task in tasks}
        asked |= set() if files == ["config/config.yaml"] else {"sample best_of_8"}
        assert set(peaks(made)) == trained | {"eval_rm rm"} | asked and len(tasks) > 1
        assert all(0 < peak < 40 * GIB for peak in peaks(made).values())
