"""Models that are only scored beside the base: planned, made, scored, listed, and compared in the report."""

import json

import pytest

from tests.conftest import MICRO, ROOT
from tests.support import report_world
from workflow_scripts.config import config as configs
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError

# The micro world's base with more training.
STRONGER = """
models:
  stronger:
    source: scratch
    scratch:
      seed: 2
      documents: {n: 1500, follow: 0.5, numeric: 0.1}
      tokenizer: {vocab_size: 800}
      model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, intermediate_size: 64,
              max_position_embeddings: 512}
      train: {steps: 32, batch: 16, max_length: 256, muon_learning_rate: 0.02, adamw_learning_rate: 0.003, weight_decay: 0.01,
              newton_schulz_steps: 5, warmup_steps: 2, decay_share: 0.3, max_grad_norm: 1.0}
"""


def load(tmp_path, text: str) -> configs.Config:
    (tmp_path / "over.yaml").write_text(text)
    return configs.load(*[ROOT / name for name in MICRO], tmp_path / "over.yaml")


def test_another_model_is_made_and_scored_and_trains_nothing(clone):
    overlaid = clone.overlay(STRONGER)
    planned = clone.plan("results/ifeval_stronger.json", configs=overlaid)
    assert planned == {"make_base": 1, "generate": 1, "score": 1}
    clone.snakemake("results/ifeval_stronger.json", configs=overlaid)
    made = json.loads((clone.folder / "results/stronger/manifest.json").read_text())
    base = json.loads((clone.folder / "results/base/manifest.json").read_text())
    assert (
        made["step"]["config"]["scratch"]["seed"] == 2
        and made["files"]["model.safetensors"] != base["files"]["model.safetensors"]
    )
    answers = json.loads((clone.folder / "results/stronger/ifeval_responses.manifest.json").read_text())
    assert answers["parents"]["start"]["path"] == "results/stronger/manifest.json" and "adapter" not in answers["parents"]

    assert clone.plan("results/ifeval_stronger.json", "results/ifeval_dpo.json", configs=overlaid) == {}
    listed = json.loads(clone.run("python", "-m", "workflow_scripts.tools.status", "--json").stdout)
    (row,) = [run for run in listed["runs"] if run["run"] == "stronger"]
    assert row["phases"]["base"] == row["phases"]["scores"] == "made" and row["prompts"] == 24
    for command in (["verify"], ["explain", "results/ifeval_stronger.json", "--configfile", *overlaid]):
        assert "STALE" not in clone.run("python", "-m", f"workflow_scripts.tools.{command[0]}", *command[1:]).stdout

    changed = clone.overlay(STRONGER.replace("steps: 32", "steps: 33"))
    assert clone.plan("results/ifeval_stronger.json", "results/ifeval_dpo.json", configs=changed) == planned
    assert "merge" not in clone.plan("results/ifeval_stronger.json", configs=changed)
    done = clone.snakemake("-n", "results/stronger/merged/manifest.json", configs=overlaid, check=False)
    assert done.returncode and "MissingRule" in done.stdout + done.stderr  # there is no adapter to merge


def test_the_other_steps_are_what_they_are_without_it(tmp_path):
    with_it, without = Plan(load(tmp_path, STRONGER)), Plan(configs.load(*[ROOT / name for name in MICRO]))
    for phase in [("base", "base"), ("slice", "sft"), ("train", "ppo"), ("merge", "sft_v2"), ("score_gsm8k", "base")]:
        assert with_it.fingerprint(*phase) == without.fingerprint(*phase)
    assert with_it.fingerprint("base", "stronger") != without.fingerprint("base", "base")
    assert with_it.fingerprint("report", "") != without.fingerprint("report", "")


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("stronger:", "dpo:", "models.dpo: an experiment has the name dpo too; rename one"),
        ("stronger:", "base:", "models.base: "),
        ("source: scratch", "source: path", "models.stronger.path: missing; models.stronger.source is path"),
        ("source: scratch", "source: hub\n    hub: {id: a/b}", "models.stronger.dtype: missing"),
        ("source: scratch", "source: hub\n    hub: {id: a/b}\n    dtype: bf16", "models.stronger.hub.revision: missing"),
        ("models:", "report: {controls: {'null': {run: stronger}}}\nmodels:", "null.run: found 'stronger', which is not trained"),
    ],
)
def test_what_a_model_must_not_be(tmp_path, old, new, words):
    with pytest.raises(InputError) as error:
        Plan(load(tmp_path, STRONGER.replace(old, new, 1))).check()
    assert words in str(error.value) and "over.yaml" in str(error.value)


@pytest.mark.slow
def test_it_can_be_the_positive_control_and_stands_in_the_tables(tmp_path):
    import yaml

    overlay = yaml.safe_load(STRONGER) | {"report": {"controls": {"positive": {"run": "stronger", "against": "base"}}}}
    config = report_world.write_config(tmp_path, overlay=overlay)
    html = report_world.report(tmp_path, report_world.make(tmp_path, config, accuracy={"stronger": 0.6}))
    assert "positive: passed" in html and "stronger must be better than base" in html
    assert "Do not trust" not in html and "only scored" in html

    again = tmp_path / "weak"
    again.mkdir()
    config = report_world.write_config(again, overlay=overlay)
    html = report_world.report(again, report_world.make(again, config, accuracy={"stronger": 0.2}))
    assert "positive: failed" in html.lower() and "Do not trust" in html
