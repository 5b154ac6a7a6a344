"""What a plan knows of methods on pairs without a reference: code, files, memory and time."""

from pathlib import Path

import pytest

from workflow_scripts.config.config import Config, load
from workflow_scripts.config.written import merge
from workflow_scripts.plan.estimate import Estimates
from workflow_scripts.plan.gpu_memory import Memory
from workflow_scripts.plan.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "config/qwen05b.yaml"


@pytest.fixture(scope="module")
def study():
    return load(STUDY)


@pytest.mark.parametrize("method", ["simpo", "orpo"])
def test_a_step_has_its_own_loss_and_the_trainer_that_it_shares_in_its_fingerprint(study, method):
    plan = Plan(study)
    code, dpo = (set(plan.step("train", run)["code"]) for run in (method, "dpo_4bit"))
    assert code - dpo == {f"steps.train_{method}", "training.reference_free"}
    assert dpo - code == {"steps.train_dpo", "training.reference"}


def test_a_loss_of_its_own_makes_nothing_else_stale(study):
    other = Plan(Config(merge(study.data, {"methods": {"simpo": {"train": {"simpo_gamma": 0.3}}}})))
    plan = Plan(study)
    changed = {run for run in study.experiments if plan.step("train", run) != other.step("train", run)}
    assert changed == {"simpo"}


@pytest.mark.parametrize("method", ["simpo", "orpo"])
def test_a_training_needs_what_dpo_needs_but_for_the_reference(study, method):
    memory = Memory(study)
    ours, dpo = (memory.train(run, study.experiments[run]).stages for run in (method, "dpo_4bit"))
    assert ours["step"] == dpo["step"]
    assert ours["objective"] < dpo["objective"]  # DPO's reference is computed in batches
    single = merge(study.data, {"methods": {"dpo": {"train": {"per_device_eval_batch_size": 1}}}})
    assert (
        ours["objective"] == Memory(Config(single)).train("dpo_4bit", Config(single).experiments["dpo_4bit"]).stages["objective"]
    )
    asked = Estimates(Plan(study))
    seconds = {run: asked._train(run)["seconds"] for run in (method, "dpo_4bit", "kto")}
    assert 0.5 * seconds["dpo_4bit"] < seconds[method] < seconds["dpo_4bit"]


def test_the_slice_says_whose_rows_have_to_fit(study):
    (limits,) = Plan(study).limits()["pairs"]
    assert {"simpo", "orpo", "dpo", "kto"} <= set(limits["user"].split(", "))


def test_new_losses_stand_in_no_confirmatory_family(study):
    for config in (
        study,
        load(ROOT / "config/smollm2.yaml"),
        load(ROOT / "config/config.yaml", ROOT / "config/reference_free.yaml"),
    ):
        report, ours = config.data["report"], {"simpo", "cpo", "orpo", "dpo_mpo"}
        named = {name: ours & {*family.get("runs", ()), *family.get("pairs", ())} for name, family in report["families"].items()}
        assert {name for name, runs in named.items() if runs} == {"reference_free", "losses"}
        assert report["confirmatory"] == "primary"
