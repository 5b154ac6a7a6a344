"""A trained reward model: it loads with its head, scores as it was judged, and the report on it says what its numbers are."""

import numpy
import pytest
import torch
from safetensors import safe_open

from tests.support import small_steps
from workflow_scripts.artifacts import manifests
from workflow_scripts.models import lora
from workflow_scripts.rl import reward_model
from workflow_scripts.steps import eval_rm


def sigmoid(x):
    return 1 / (1 + numpy.exp(-x))


@pytest.fixture(scope="module")
def rm(folder, base, pairs):
    """A trained reward model, on NF4 as the config says; with large steps, so that its rewards are not all alike."""
    return small_steps.train(folder / "trained rm", "rm", base, pairs, learning_rate=0.005, num_train_epochs=6)


def test_a_saved_reward_model_loads_with_its_head_and_has_the_rewards_that_it_was_judged_by(rm, base, pairs, tmp_path):
    start, held = manifests.read(base), manifests.read(pairs).rows(heldout=True)
    model, tokenizer = reward_model.load(start, rm, tmp_path, "cpu", "fp32", small_steps.QUANT)
    found = reward_model.objective(*reward_model.score_pairs(model, tokenizer, held, 50, 128))
    assert found == rm.data["objective"]["after"]
    assert found["n"] == len(held) and found != rm.data["objective"]["before"]


@pytest.mark.trained
def test_the_head_stays_in_fp32_on_a_backbone_that_computes_in_bf16(rm, base, pairs, tmp_path, figure):
    """As on a GPU: what was learnt in fp32 is not rounded, and the head multiplies fp32 by fp32."""
    start, held = manifests.read(base), manifests.read(pairs).rows(heldout=True)
    model, tokenizer = reward_model.load(start, rm, tmp_path, "cpu", "bf16", small_steps.QUANT)
    head = next(p for name, p in model.named_parameters() if f"{lora.HEAD}.modules_to_save.default" in name)
    with safe_open(rm.file("adapter_model.safetensors"), framework="pt") as file:
        assert torch.equal(head, file.get_tensor(f"base_model.model.{lora.HEAD}.weight"))
    exact, tokenizer = reward_model.load(start, rm, tmp_path, "cpu", "fp32", small_steps.QUANT)
    found, wanted = (numpy.concatenate(reward_model.score_pairs(one, tokenizer, held, 50, 128)) for one in (model, exact))
    figure("spread of the rewards", wanted.std().item(), at_least=0.05)  # a rate that is too large makes them all alike
    figure("gap of the rewards over their spread", (abs(found - wanted).mean() / wanted.std()).item(), at_most=0.1)


def evaluate(rm, base, pairs, out):
    parents = {"start": base, "adapter": rm.path, "rows": pairs}
    config = {"quantise": "nf4", "quant": small_steps.QUANT, "batch_size": 50, "max_length": 128}
    return small_steps.run(small_steps.job("eval_rm", out / "rm_eval.json", parents, config))


def test_rm_eval_agrees_with_the_manifest_of_the_run(rm, base, pairs, tmp_path):
    found = evaluate(rm, base, pairs, tmp_path).data
    after = rm.data["objective"]["after"]
    assert (found["accuracy"], found["n_pairs"]) == (after["accuracy"], after["n"])
    assert found["mean_margin"] == pytest.approx(after["margin"], abs=1e-5)
    assert found["left_out"] == 0 and [row["id"] for row in found["per_pair"]] == [f"pairs/{i}" for i in range(32, 40)]
    assert numpy.mean([row["chosen"] > row["rejected"] for row in found["per_pair"]]) == after["accuracy"]


# -- the report on a reward model, from numbers made by hand ----------------------------------------------------------


def test_the_report_on_rewards_made_by_hand():
    """Six pairs: margins 2, 1, -0.5, 3, -4, 0. A tie is wrong; the pairs by size of margin fall into groups of 2, 1, 1, 1, 1."""
    chosen, rejected = [2.0, 1.0, 0.0, 3.0, -2.0, 1.0], [0.0, 0.0, 0.5, 0.0, 2.0, 1.0]
    lengths = [(5, 4), (6, 6), (2, 3), (9, 1), (1, 8), (4, 4)]
    found = eval_rm.report(chosen, rejected, lengths)
    assert found["n_pairs"] == 6 and found["accuracy"] == 0.5
    assert found["accuracy_stderr"] == pytest.approx(numpy.sqrt(6 * 0.25 / 5 / 6))
    assert found["accuracy_ci95"] == pytest.approx([0.11812, 0.88188], abs=1e-5)  # Clopper-Pearson, 3 of 6
    assert found["mean_margin"] == pytest.approx(1.5 / 6)
    wanted = [(2, (0.5 + sigmoid(0.5)) / 2, 0), (1, sigmoid(1), 1), (1, sigmoid(2), 1), (1, sigmoid(3), 1), (1, sigmoid(4), 0)]
    groups = [(g["n"], g["mean_probability"], g["accuracy"]) for g in found["calibration"]]
    assert groups == [pytest.approx(group) for group in wanted]
    error = sum(n * abs(p - right) for n, p, right in wanted) / 6
    assert found["expected_calibration_error"] == pytest.approx(error)
    length = found["length"]
    # Ranks of the margins 5, 4, 2, 6, 1, 3 and of the differences 1, 0, -1, 8, -7, 0: 5, 3.5, 2, 6, 1, 3.5.
    ranks = numpy.array([5, 4, 2, 6, 1, 3]), numpy.array([5, 3.5, 2, 6, 1, 3.5])
    assert length["margin_against_difference"] == pytest.approx(numpy.corrcoef(*ranks)[0, 1])
    assert length["longer_is_chosen"] == pytest.approx((2 + 0.5 * 2) / 6)


def test_rewards_that_are_the_lengths_correlate_with_them_fully():
    tokens = [(7, 3), (2, 9), (5, 1), (8, 4)]
    found = eval_rm.report([float(a) for a, _ in tokens], [float(b) for _, b in tokens], tokens)
    assert found["length"]["reward_against_tokens"] == pytest.approx(1)
    shorter = eval_rm.report([-float(a) for a, _ in tokens], [-float(b) for _, b in tokens], tokens)
    assert shorter["length"]["reward_against_tokens"] == pytest.approx(-1)
    assert found["accuracy"] == 0.75 and shorter["accuracy"] == 0.25 and found["length"]["longer_is_chosen"] == 0.75


def test_rewards_that_are_all_equal_are_wrong_everywhere_and_correlate_with_nothing():
    found = eval_rm.report([1.0] * 3, [1.0] * 3, [(4, 5), (6, 5), (3, 3)])
    assert found["accuracy"] == 0 and found["accuracy_ci95"][0] == 0
    assert found["length"]["reward_against_tokens"] is None and found["length"]["margin_against_difference"] is None


def test_a_report_on_a_single_pair_has_no_standard_error():
    assert eval_rm.report([1.0], [0.0], [(4, 5)])["accuracy_stderr"] is None
