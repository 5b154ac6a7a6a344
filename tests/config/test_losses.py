"""What a loss asks for is asked for when the config is read, not once a card is taken."""

from pathlib import Path

import pytest
import yaml

from workflow_scripts.config.config import load
from workflow_scripts.config.schema import SCHEMA
from workflow_scripts.plumbing.messages import InputError

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "config/config.yaml", ROOT / "config/reference_free.yaml"

MISTAKES = {
    # sums of DPO's losses
    "x: {extends: dpo, train: {loss_type: [sigmoid, sft]}}": ("loss_weights", "missing: a sum of sigmoid, sft needs a weight"),
    "x: {extends: dpo, train: {loss_type: [sigmoid, sft], loss_weights: [1.0, 2.0, 3.0]}}": (
        "loss_weights", "found 3 weights, and loss_type has 2 entries; give one for each"),
    "x: {extends: dpo, train: {loss_weights: [1.0, 2.0]}}": ("loss_weights", r"with one loss \(sigmoid\); make loss_type a list"),
    "x: {extends: dpo, train: {loss_type: [sigmoid, sft], loss_weights: [1.0, 0]}}": (r"loss_weights\.1", "expected a number"),
    "x: {extends: dpo, train: {loss_type: sft}}": ("loss_type", "found the string 'sft', expected one of sigmoid"),
    "x: {extends: dpo, train: {loss_type: [sigmoid], loss_weights: [1.0, 1.0]}}": ("loss_type", "found a list, expected one of"),
    "x: {extends: dpo, train: {loss_type: [sigmoid, sigmoid], loss_weights: [1.0, 1.0]}}": ("loss_type", "none twice"),
    "x: {extends: dpo, train: {loss_type: [sigmoid, spo], loss_weights: [1.0, 1.0]}}": ("loss_type", "found a list, expected"),
    # what a loss has to have
    "x: {extends: dpo, train: {loss_type: aot, per_device_train_batch_size: 1}}": (
        "per_device_train_batch_size", "found 1: aot sorts the pairs of a batch"),
    "x: {extends: dpo, train: {loss_type: exo_pair}}": ("label_smoothing", "missing: exo_pair"),
    "x: {extends: dpo, train: {loss_type: sppo_hard, f_divergence_type: js_divergence}}": (
        "f_divergence_type", "found js_divergence with sppo_hard, which knows reverse_kl alone"),
    "x: {extends: grpo, train: {loss_type: cispo}}": ("epsilon_high", "missing: cispo bounds the ratio itself"),
    "x: {extends: grpo, train: {loss_type: cispo, epsilon_high: 0.28}}": ("epsilon_high", "found 0.28: cispo bounds the ratio"),
    "x: {extends: grpo, train: {loss_type: sapo, sapo_temperature_pos: 1.0}}": ("sapo_temperature_neg", "missing: sapo's gate"),
    "x: {extends: grpo, train: {sapo_temperature_pos: 1.0}}": ("sapo_temperature_pos", "found 1.0 with loss_type grpo"),
    # no reference model
    "x: {extends: simpo, train: {precompute_ref_log_probs: true}}": (
        "precompute_ref_log_probs", "no reference model in simpo; unknown key for method simpo"),
    "x: {extends: orpo, train: {f_divergence_type: js_divergence}}": ("f_divergence_type", "no reference model in orpo"),
    "x: {extends: cpo, train: {precompute_ref_batch_size: 4}}": ("precompute_ref_batch_size", "no reference model in cpo"),
    "x: {extends: simpo, train: {loss_type: sigmoid}}": ("loss_type", "unknown key for method simpo; known here: .*simpo_gamma"),
    "x: {extends: orpo, train: {simpo_gamma: 1.0}}": ("simpo_gamma", "unknown key for method orpo"),
    "x: {extends: simpo, train: {simpo_gamma: -1}}": ("simpo_gamma", "found -1, expected a number at least 0"),
}  # fmt: skip


@pytest.mark.parametrize("experiments", MISTAKES)
def test_a_loss_that_lacks_something_is_refused_with_its_key(tmp_path, experiments):
    (tmp_path / "over.yaml").write_text(f"experiments: {{{experiments}}}")
    key, says = MISTAKES[experiments]
    with pytest.raises(InputError, match=rf"over\.yaml: experiments\.x\.train\.{key}: .*{says}") as caught:
        load(*FILES, tmp_path / "over.yaml")
    assert len(str(caught.value).splitlines()) == 1


def test_a_micro_batch_of_kto_has_whole_groups(tmp_path):
    (tmp_path / "over.yaml").write_text("experiments: {kto: {kl_rows: 5}}")
    says = (
        r"over\.yaml: experiments\.kto\.kl_rows: found 5, but a micro-batch of 16 .* has no whole groups of it; take 2, 4, 8, 16"
    )
    with pytest.raises(InputError, match=says):
        load(*FILES, tmp_path / "over.yaml")


@pytest.mark.parametrize("body", ["slice: sft", "class_weights: ratio", "reward: ifeval"])
@pytest.mark.parametrize("method", ["simpo", "cpo", "orpo"])
def test_pairs_alone_are_trained_on_and_no_other_method_s_keys_are_taken(tmp_path, method, body):
    (tmp_path / "over.yaml").write_text(f"experiments: {{x: {{method: {method}, {body}}}}}")
    with pytest.raises(
        InputError, match=rf"experiments\.x\.{body.split(':')[0]}: (found 'sft', expected a slice of kind pref|unknown)"
    ):
        load(*FILES, tmp_path / "over.yaml")


ALLOWED = """
experiments:
  mpo: {extends: dpo, train: {loss_type: [sigmoid, bco_pair, sft], loss_weights: [0.8, 0.2, 1.0]}}
  aot: {extends: dpo, train: {loss_type: aot}}
  sppo: {extends: dpo, train: {loss_type: sppo_hard}}
  cispo: {extends: grpo, train: {loss_type: cispo, epsilon_high: 5.0}}
  sapo: {extends: grpo, train: {loss_type: sapo, sapo_temperature_pos: 1.0, sapo_temperature_neg: 1.05}}
  full: {extends: simpo, quantise: none, flip_labels: true}
"""


def test_what_is_whole_is_taken_and_trl_takes_it_too(tmp_path):
    from trl import DPOConfig

    (tmp_path / "over.yaml").write_text(ALLOWED)
    made = load(*FILES, tmp_path / "over.yaml").experiments
    assert set(yaml.safe_load(ALLOWED)["experiments"]) <= set(made)
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **made["mpo"]["train"])
    assert args.loss_type == ["sigmoid", "bco_pair", "sft"] and args.loss_weights == [0.8, 0.2, 1.0]


def test_the_sentence_of_the_losses_names_each_of_them():
    rule = SCHEMA["$defs"]["train_dpo"]["properties"]["loss_type"]
    one, several = rule["oneOf"]
    assert several["items"]["enum"] == [*one["enum"], "sft"]
    assert rule["description"].startswith(f"one of {', '.join(one['enum'])}; or ")
