"""Did it train? The verdict on one adapter's manifest, by hand-made numbers and by real trainings with and without a rate."""

import pytest

from tests.support.right_way import ROLLOUTS, sample
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.report.trained import NOT_SEEN, OTHER_WAY, SAME_WAY, TRAINED, UNKNOWN, WRONG_WAY, interval_of, trained


def manifest(method, **values):
    """values: name -> (before, after, standard error, n)."""
    objective = {
        "before": {name: value[0] for name, value in values.items()},
        "after": {name: value[1] for name, value in values.items()},
        "change": {
            name: {"mean": after - before, "stderr": stderr, "n": n}
            for name, (before, after, stderr, n) in values.items()
            if before is not None
        },
    }
    return {"kind": "adapter", "step": {"config": {"method": method}}, "objective": objective}


def test_the_interval_is_students_with_n_minus_1():
    assert interval_of(2.0, 0.5, 3) == pytest.approx((2 - 4.302653 * 0.5, 2 + 4.302653 * 0.5))
    assert interval_of(2.0, 0.5, 10) == pytest.approx((2 - 2.262157 * 0.5, 2 + 2.262157 * 0.5))
    assert interval_of(2.0, None, 1) is None


@pytest.mark.parametrize(
    ("method", "values", "verdict"),
    [
        ("sft", {"loss": (2.0, 1.0, 0.4, 10)}, TRAINED),  # -1 +- 0.905
        ("sft", {"loss": (2.0, 1.0, 0.5, 10)}, NOT_SEEN),  # -1 +- 1.13
        ("sft", {"loss": (2.0, 1.0, 0.4, 3)}, NOT_SEEN),  # -1 +- 1.72
        ("sft", {"loss": (1.0, 2.0, 0.1, 10)}, WRONG_WAY),
        ("sft", {"loss": (1.0, 1.0, 0.0, 10)}, NOT_SEEN),
        ("sft", {"loss": (2.0, 1.0, None, 1)}, UNKNOWN),
        ("dpo", {"accuracy": (0.0, 0.9, 0.1, 20), "margin": (0.0, 0.5, 0.1, 20)}, TRAINED),
        ("dpo", {"accuracy": (0.0, 0.5, 0.1, 20), "margin": (0.0, 0.0, 0.0, 20)}, NOT_SEEN),  # ties that rounding broke
        ("rm", {"accuracy": (0.5, 0.6, 0.1, 20), "margin": (0.0, 0.5, 0.1, 20)}, NOT_SEEN),
        ("kto", {"accuracy": (None, None, None, 0), "margin": (0.0, 0.5, 0.1, 20)}, TRAINED),  # no prompt with both answers
        ("kto", {"accuracy": (0.0, 0.9, None, 1), "margin": (0.0, 0.0, 0.0, 20)}, NOT_SEEN),  # one that failed is enough
        ("simpo", {"accuracy": (0.7, 0.7, 0.1, 20), "margin": (1.0, 1.5, 0.1, 20), "nll": (2.0, 2.1, 0.1, 20)}, TRAINED),
        ("orpo", {"accuracy": (0.7, 0.9, 0.01, 20), "margin": (1.0, 1.0, 0.1, 20)}, NOT_SEEN),  # ordered before: the margin
        ("cpo", {"margin": (1.0, 0.5, 0.1, 20)}, WRONG_WAY),
        ("grpo", {"reward": (0.2, 0.4, 0.05, 20), "tokens": (9, 1, 0.1, 20)}, TRAINED),
        ("ppo", {"reward": (0.4, 0.2, 0.05, 20)}, WRONG_WAY),
        ("dpo", {"accuracy": (0.0, 0.2, 0.05, 20), "margin": (0.0, -0.5, 0.1, 20)}, WRONG_WAY),
        ("rloo", {"reward": (0.2, 0.2, 0.05, 20)}, NOT_SEEN),
    ],
)
def test_the_verdict(method, values, verdict):
    found = trained(manifest(method, **values))
    assert found["verdict"] == verdict
    assert found["trained"] is {TRAINED: True, NOT_SEEN: False, WRONG_WAY: False, UNKNOWN: None}[verdict]


@pytest.mark.parametrize(
    ("margin", "verdict"),
    [
        ((0.0, -0.5, 0.1, 20), OTHER_WAY),
        ((0.0, -0.1, 0.1, 20), NOT_SEEN),
        ((0.0, 0.5, 0.1, 20), SAME_WAY),  # labels that did not flip
        ((0.0, -0.5, None, 1), UNKNOWN),
    ],
)
def test_a_control_with_flipped_labels_has_to_go_the_other_way(margin, verdict):
    """From nothing but ties, the accuracy rises whatever the way."""
    control = manifest("dpo", accuracy=(0.0, 0.1, 0.02, 20), margin=margin)
    control["step"]["config"]["flip_labels"] = True
    found = trained(control)
    assert found["verdict"] == verdict
    assert found["trained"] is {OTHER_WAY: True, NOT_SEEN: False, SAME_WAY: False, UNKNOWN: None}[verdict]


def test_what_a_value_says():
    (loss,) = trained(manifest("sft", loss=(2.0, 1.0, 0.4, 10), token_accuracy=(0.1, 0.2, 0.3, 10)))["values"]
    low, high = loss.pop("interval")
    assert (low, high) == pytest.approx((-1.904863, -0.095137), abs=1e-6)
    assert loss == {"name": "loss", "good": "down", "before": 2.0, "after": 1.0, "change": -1.0, "moved": True, "wrong": False}


def test_a_manifest_without_a_change_gives_no_interval():
    old = manifest("dpo", accuracy=(0.0, 0.9, 0.1, 20), margin=(0.0, 0.5, 0.1, 20))
    del old["objective"]["change"]
    found = trained(old)
    assert found["trained"] is None and found["verdict"] == UNKNOWN
    assert [(one["change"], one["interval"], one["moved"]) for one in found["values"]] == [(None, None, None)] * 2
    assert found["values"][1]["after"] == 0.5


@pytest.mark.parametrize("other", [{"kind": "base", "step": {"config": {}}}, {"kind": "slice"}])
def test_a_manifest_that_is_no_adapters_is_refused(other):
    with pytest.raises(InputError, match=f"^a manifest of kind '{other['kind']}': expected an adapter's.*; give results/"):
        trained(other)


# -- real trainings ---------------------------------------------------------------------------------------------------


def reach(value):
    """A change towards the good side, in half-widths of its interval."""
    low, high = value["interval"]
    return 0.0 if low == high == 0 else value["change"] * (1 if value["good"] == "up" else -1) / ((high - low) / 2)


@pytest.mark.trained
@pytest.mark.parametrize("method", sample("dpo", "grpo", "sft_v2", "kto", "rm", "ppo_ifeval", "rloo"))
def test_a_learning_rate_of_next_to_nothing_is_told_from_a_real_one(right_way, method, tmp_path, figure):
    real = right_way(method).data
    steps = 8 if method == "ppo_ifeval" else 2  # one rollout: more of nothing would be the same
    none = right_way.train(tmp_path, method, learning_rate=1.0e-12, max_steps=steps).data
    assert real["objective"]["before"] == none["objective"]["before"]
    for data in (real, none):
        assert all(one["n"] >= 10 and one["stderr"] is not None for one in data["objective"]["change"].values())
        for name, one in data["objective"]["change"].items():
            gained = data["objective"]["after"][name] - data["objective"]["before"][name]
            assert one["mean"] == pytest.approx(gained, abs=5e-6)
    # In half-widths of the 95 % interval: beyond 1 a value moved, and a method trained if all of its values did. Answers are
    # sampled anew after training: of changes that mean nothing one in forty is beyond 1, the good way, one in 2,000 beyond 1.7.
    line = 1.7 if method in ROLLOUTS else 1
    found, nothing = (min(map(reach, trained(data)["values"])) for data in (real, none))
    figure("change over its uncertainty", found, at_least=line)
    figure("the same, no learning rate", nothing, at_most=line)
    assert trained(real)["verdict"] == TRAINED, trained(real)
    assert trained(none)["verdict"] in ({TRAINED} if nothing > 1 else {NOT_SEEN, WRONG_WAY}), trained(none)
