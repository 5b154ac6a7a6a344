"""`gpus: N`: refused early where a training can't be shared, and in nothing that a step or a comparison reads."""

from pathlib import Path

import pytest

from workflow_scripts.artifacts.fingerprint import fingerprint
from workflow_scripts.config.config import load
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
    assert [found[name] for name in ("dpo", "dpo_ipo", "ranks", "ranks_r8", "sft_v2", "ppo")] == [2, 4, 2, 2, 1, 1]
    assert not any("gpus" in body for body in plan.config.experiments.values())


def test_it_is_in_no_step_and_asks_for_less_time(tmp_path):
    one, two = plans(tmp_path, "methods: {sft: {gpus: 2}, dpo: {gpus: 2}}")
    for run in ("sft_v2", "dpo", "dpo.seed2", "ppo"):
        assert fingerprint(one.train(run)) == fingerprint(two.train(run))
    seconds = [Estimates(plan).of("train", "dpo")["seconds"] for plan in (one, two)]
    memory = [Estimates(plan).of("train", "dpo")["memory_mb"] for plan in (one, two)]
    phases = Memory(two.config).phases()
    assert "train dpo (each of 2) " in fits.table(phases, [80.0], two.config.gpus)
    assert seconds[1] < 0.85 * seconds[0] and memory[1] == pytest.approx(2 * memory[0])
