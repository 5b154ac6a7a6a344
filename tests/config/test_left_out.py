"""A config laid over another leaves out what that has."""

import pytest

from tests.conftest import ROOT
from workflow_scripts.config.config import Config, load
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError

BELOW = ROOT / "config/config.yaml"
ONE_FAMILY = """
report:
  families: {primary: {runs: [dpo]}, methods: null, base: null, gsm8k: null}
"""


@pytest.fixture
def over(tmp_path):
    def laid(text: str) -> Config:
        (tmp_path / "over.yaml").write_text(text)
        return load(BELOW, tmp_path / "over.yaml")

    return laid


def test_an_experiment_and_what_names_it(over):
    made = over(f"experiments: {{kto: null}}\n{ONE_FAMILY}")
    assert "kto" not in made.experiments and "kto" in load(BELOW).experiments
    plan = Plan(made)
    assert not [file for file in plan.report_inputs() if "_kto" in file]
    assert plan.fingerprint("train", "dpo") == Plan(load(BELOW)).fingerprint("train", "dpo")


def test_an_evaluation_and_a_control(over):
    made = over(f'eval: {{gsm8k: null}}\n{ONE_FAMILY}  controls: {{"null": null}}\n')
    assert made.scored == ["ifeval"] and set(made.data["report"]["controls"]) == {"negative", "positive"}


def test_who_names_what_was_left_out_is_told(over):
    with pytest.raises(InputError, match=r"config.yaml: report.families.primary.runs.*kto"):
        Plan(over("experiments: {kto: null}\n")).check()


def test_a_name_that_is_new_is_a_mistake(over):
    with pytest.raises(InputError, match=r"over.yaml: experiments.ktoo: found nothing"):
        over("experiments: {ktoo: null}\n")


def test_a_slice_and_who_names_it(tmp_path):
    (tmp_path / "over.yaml").write_text("data: {slices: {best_of_8: null, pairs_of_8: null}}\n")
    with pytest.raises(InputError, match=r"smollm2.yaml: experiments.dpo_onpolicy.slice: found 'pairs_of_8'"):
        load(ROOT / "config/smollm2.yaml", tmp_path / "over.yaml")
