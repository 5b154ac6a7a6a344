"""`gpus: N`: refused early where a training can't be shared, and in nothing that a step or a comparison reads."""

from pathlib import Path

import pytest

from tests.support.shapes import LARGE, memory
from workflow_scripts.artifacts.fingerprint import fingerprint
from workflow_scripts.config.config import load
from workflow_scripts.plan import gpu_memory
from workflow_scripts.plan.estimate import Estimates
from workflow_scripts.plan.gpu_memory import Memory
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import fits

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "config/config.yaml"

MISTAKES = {
    "experiments: {dpo: {gpus: 4, train: {gradient_accumulation_steps: 6}}}": (
        "experiments.dpo.gpus", "found 4, but the 6 micro-batches of a step .* effective batch stays; take 1, 2, 3, 6$"),
    "experiments: {dpo: {gpus: 2}}": ("experiments.dpo.gpus", "take 1, or smaller micro-batches and more of them$"),
    "experiments: {ppo: {gpus: 2}}": ("experiments.ppo.gpus", "found 2, but ppo trains on one GPU: its policy and its value"),
    "methods: {ppo: {gpus: 2}}": ("methods.ppo.gpus", "found 2, but ppo trains on one GPU"),
    "methods: {kto: {gpus: 3, train: {gradient_accumulation_steps: 4}}}": (
        "methods.kto.gpus", "found 3, .* take 1, 2, 4$"),
    "experiments: {dpo: {gpus: 0}}": ("experiments.dpo.gpus", "found 0, expected an integer at least 1"),
    "experiments: {dpo: {gpus: '2'}}": ("experiments.dpo.gpus", "expected an integer"),
    "experiments: {dpo: {gpus: all}}": ("experiments.dpo.gpus", "expected an integer"),
    "gpus: 2": ("gpus", "unknown key"),
    "experiments: {dpo: {nodes: 2}}": ("experiments.dpo.nodes", "found 2, but dpo has 1 GPUs .gpus., which so many nodes"),
    "methods: {sft: {gpus: 4, nodes: 3, train: {gradient_accumulation_steps: 4}}}": (
        "methods.sft.nodes", "found 3, but sft_v[12] has 4 GPUs"),
    "experiments: {dpo: {shard: true}}": ("experiments.dpo.shard", "found true, but dpo has one GPU, .* set gpus: 2 or more$"),
    "methods: {grpo: {gpus: 2, shard: true}}": (
        "methods.grpo.shard", "found true, but grpo draws its answers with the weights of the whole base; leave it away$"),
    "methods: {sft: {gpus: 2, shard: true, train: {gradient_accumulation_steps: 2}}}": (
        "methods.sft.shard", "the base of sft_v[12] is in 4-bit, .* set quantise: none, or shard: false for sft_v[12]$"),
    "experiments: {dpo: {shard: 2}}": ("experiments.dpo.shard", "found 2, expected true or false"),
}  # fmt: skip


@pytest.mark.parametrize("over", MISTAKES)
def test_what_can_t_be_shared_is_refused_with_its_key(tmp_path, over):
    (tmp_path / "over.yaml").write_text(over)
    key, says = MISTAKES[over]
    with pytest.raises(InputError, match=rf"over\.yaml: {key}: .*{says}") as caught:
        load(TINY, tmp_path / "over.yaml")
    assert len(str(caught.value).splitlines()) == 1


def plans(tmp_path, over: str) -> list[Plan]:
    """Of one config with one GPU for each training, and with what `over` says."""
    accumulated = "methods: {sft: {train: {gradient_accumulation_steps: 4}}, dpo: {train: {gradient_accumulation_steps: 4}}}"
    (tmp_path / "more.yaml").write_text(accumulated)
    (tmp_path / "over.yaml").write_text(over)
    return [Plan(load(TINY, tmp_path / "more.yaml", *files)) for files in ([], [tmp_path / "over.yaml"])]


def test_it_is_inherited_and_one_experiment_can_have_another(tmp_path):
    _, plan = plans(
        tmp_path, "{methods: {dpo: {gpus: 2}}, experiments: {dpo_ipo: {gpus: 4}, ranks: {extends: dpo, sweep: rank}}}"
    )
    found = plan.config.gpus
    assert set(plan.config.parts.values()) == {1}
    assert [found[name] for name in ("dpo", "dpo_ipo", "ranks", "ranks_r8", "sft_v2", "ppo")] == [2, 4, 2, 2, 1, 1]
    assert not any("gpus" in body for body in plan.config.experiments.values())


def test_it_is_in_no_step_and_asks_for_less_time(tmp_path):
    one, two = plans(tmp_path, "methods: {sft: {gpus: 2}, dpo: {gpus: 2}}")
    for run in ("sft_v2", "dpo", "dpo.seed2", "ppo"):
        assert fingerprint(one.train(run)) == fingerprint(two.train(run))
    seconds = [Estimates(plan).of("train", "dpo")["seconds"] for plan in (one, two)]
    memory = [Estimates(plan).of("train", "dpo")["memory_mb"] for plan in (one, two)]
    phases = Memory(two.config).phases()
    assert "train dpo (each of 2) " in fits.table(phases, [80.0], two.config.gpus, two.config.parts)
    assert seconds[1] < 0.85 * seconds[0] and memory[1] == pytest.approx(2 * memory[0])


def test_a_base_in_parts_is_in_no_step_and_takes_less_of_each_card(tmp_path):
    one, two = plans(tmp_path, "experiments: {dpo: {gpus: 4, shard: true}, dpo_4bit: {shard: false}}")
    assert [two.config.parts[name] for name in ("dpo", "dpo_ipo", "dpo_4bit", "kto")] == [4, 4, 1, 1]
    assert fingerprint(one.train("dpo")) == fingerprint(two.train("dpo"))
    assert not any("shard" in body for body in two.config.experiments.values())
    assert "train dpo (each of 4), base in parts " in fits.table(
        Memory(two.config).phases(), [80.0], two.config.gpus, two.config.parts
    )


def test_make_fits_says_how_many_cards_a_base_in_full_precision_needs():
    made = memory(files=LARGE)
    phase = made.train("dpo", made.config.experiments["dpo"])
    assert not gpu_memory.fits(phase.peak, 16)
    changes, peak = fits.in_parts(made, phase, 16)
    assert changes == {"gpus": 2, "shard": True}
    body = made.config.experiments["dpo"]
    less = made.train("dpo", body | {"parts": changes["gpus"]})
    assert less.peak == peak and gpu_memory.fits(peak, 16)
    layers = 2 * made.shape.linear
    assert phase.peak - peak == pytest.approx(layers * (1 - 1 / changes["gpus"] - 3 / made.shape.layers))
    line = next(line for line in fits.advice(made, [phase], 16) if "train dpo" in line)
    assert line.endswith(f"gpus: {changes['gpus']}, shard: true; then {peak / 2**30:.1f} GiB on each") and "quantise: nf4" in line
    assert fits.in_parts(made, made.generate("ifeval", 1), 16) is None


def test_more_cards_than_the_config_would_take_are_no_advice():
    made = memory(files=LARGE)
    phase = made.train("dpo", made.config.experiments["dpo"])
    found = fits.in_parts(made, phase, 11)
    assert found is not None and found[0]["gpus"] == 4
    made.config.data["deterministic"] = True
    assert fits.in_parts(made, phase, 11) is None
    assert fits.in_parts(made, phase, 16)[0]["gpus"] == 2
