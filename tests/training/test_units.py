"""The units of the held-out objective: what they are to TRL's own means, the arithmetic of a change, and what TRL must have."""

import inspect
import random
from math import sqrt
from statistics import fmean, stdev

import pytest

from tests.support import small_steps
from workflow_scripts.training import change, trainers, units

# Method -> (TRL's names of what the step takes, units among 8 held-out rows in batches of 2: rows, pairs, KTO's groups, prompts)
ROLLOUT = ("reward", "completions/mean_length", "rewards/ifeval/mean")
METHODS = {
    "sft_v2": (("loss", "mean_token_accuracy"), 8),
    "dpo": (("loss", "rewards/accuracies", "rewards/margins"), 8),
    "simpo": (("loss", "rewards/accuracies", "rewards/margins", "nll"), 8),
    "kto": (("loss",), 8),  # 8 pairs taken apart
    "ppo_ifeval": (ROLLOUT, 8),
    "grpo": (ROLLOUT, 8),
    "rloo": (ROLLOUT, 8),
}
SIZES = {
    "ppo_ifeval": {"per_device_train_batch_size": 4, "steps_per_generation": 2, "max_completion_length": 32},
    "grpo": {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 32},
    "rloo": {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 32},
}


@pytest.fixture(scope="module")
def trainer(folder, speaking_base, slices):
    """method -> its trainer as the step builds it, with an adapter that is not at its start."""
    import torch

    def build(method, size=2, **more):
        more = SIZES.get(method, {}) | {"per_device_eval_batch_size": size} | more
        built = small_steps.built_trainer(folder / method, method, speaking_base, slices[method], **more)
        torch.manual_seed(1)
        for name, parameter in built.model.named_parameters():
            if "lora_B" in name:
                parameter.data += 0.01 * torch.randn_like(parameter)
        return built

    return build


@pytest.mark.parametrize("method", METHODS)
def test_the_mean_over_the_units_is_what_trl_reports(trainer, method):
    figures, n = METHODS[method]
    built = trainer(method)
    with units.kept(built) as found:
        metrics = built.evaluate()
    for figure in figures:
        assert figure in found, f"{type(built).__name__} has no {figure} in _metrics['eval'] any more: training/units.py takes it"
        assert len(found[figure]) == n
        if method != "sft_v2":  # whose batches TRL weighs alike, however many tokens they have
            assert fmean(found[figure]) == pytest.approx(metrics[f"eval_{figure}"], abs=1e-6)
        if figure != "rewards/accuracies":  # of two pairs a batch: often one
            assert len(set(found[figure])) > 1, "units that are all alike show nothing"
    assert not {"prediction_step", "_calculate_rewards"} & set(vars(built))  # the wraps are gone
    assert not built.model._forward_hooks


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_rows_of_sft_weigh_by_their_tokens_whatever_the_batch(trainer, loss):
    """TRL's figures of all held-out rows in one batch are the means over the rows, and those of a batch of one are a row's."""
    whole, alone, pairs = (trainer("sft_v2", size, loss_type=loss) for size in (8, 1, 2))
    metrics = whole.evaluate()
    with units.kept(pairs) as found:
        pairs.evaluate()
    tokens = [sum(label != -100 for label in alone.data_collator([row])["labels"][0][1:]) for row in alone.eval_dataset]
    assert len(set(map(int, tokens))) > 1
    each: dict = {"loss": [], "mean_token_accuracy": []}
    predict = alone.prediction_step

    def step(*args, **kwargs):
        result = predict(*args, **kwargs)
        each["loss"].append(result[0].item())
        each["mean_token_accuracy"] = list(alone._metrics["eval"]["mean_token_accuracy"])
        return result

    alone.prediction_step = step
    alone.evaluate()
    for figure, rows in each.items():
        assert fmean(found[figure]) == pytest.approx(metrics[f"eval_{figure}"], abs=1e-6)
        parts = [(value * int(n), int(n)) for value, n in zip(rows, tokens, strict=True)]
        assert found[figure] == pytest.approx(change.of_ratio(parts), abs=1e-5)


@pytest.mark.parametrize("method", ["sft_v2", "dpo", "ppo_ifeval"])
def test_an_objective_counts_rows_and_not_batches(trainer, method):
    keys = {"sft_v2": {"loss": "loss"}, "dpo": {"accuracy": "rewards/accuracies", "margin": "rewards/margins"}}
    built = trainer(method, size=4)
    values, found = trainers.objective(built, keys.get(method, {"reward": "reward"}))
    assert {name: len(one) for name, one in found.items()} == dict.fromkeys(values, 8)
    assert values == {name: pytest.approx(fmean(one), abs=1e-6) for name, one in found.items()}
    assert built.args.per_device_eval_batch_size == 4


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_the_same_units_twice_where_nothing_changed(trainer, method):
    """Without sampling the numbers are equal too; with it the prompts are."""
    built, found = trainer(method), []
    for _ in range(2):
        with units.kept(built) as one:
            built.evaluate()
        found.append(one)
    if method == "dpo":
        assert found[0] == found[1]
    assert {name: len(values) for name, values in found[0].items()} == {name: len(values) for name, values in found[1].items()}


@pytest.mark.parametrize("name", ["SFTTrainer", "DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer"])
def test_a_method_of_trl_that_the_units_come_from_is_as_it_was(name):
    import trl

    kind = getattr(trl, name)
    assert [*inspect.signature(kind.prediction_step).parameters][:3] == ["self", "model", "inputs"], f"{name}.prediction_step"
    if name in ("GRPOTrainer", "RLOOTrainer"):
        method = getattr(kind, "_calculate_rewards", None)
        assert method is not None, f"{name}._calculate_rewards is gone: training/units.py wraps it"
        wanted = ["self", "inputs", "prompts", "completions", "completion_ids_list"]
        assert [*inspect.signature(method).parameters] == wanted, f"{name}._calculate_rewards takes other arguments"


@pytest.mark.parametrize("method", METHODS)
def test_an_attribute_of_trl_that_the_units_come_from_is_there(trainer, method):
    built = trainer(method)
    assert isinstance(getattr(built, "_metrics", {}).get("eval"), dict), f"{type(built).__name__}._metrics['eval'] is gone"
    for name in ("reward_func_names", "reward_weights") if method in SIZES else ():
        assert hasattr(built, name), f"{type(built).__name__}.{name} is gone: training/units.py reads it"


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_a_change_is_paired():
    """Units that differ by thousands, each of which moves by 1, 2 and 3."""
    before, after = [1000.0, 20.0, 3.0], [1001.0, 22.0, 6.0]
    assert change.changes({"loss": before}, {"loss": after}) == {"loss": {"mean": 2.0, "stderr": round(1 / sqrt(3), 6), "n": 3}}


def test_a_single_unit_has_no_standard_error():
    assert change.changes({"loss": [1.0]}, {"loss": [0.5]}) == {"loss": {"mean": -0.5, "stderr": None, "n": 1}}


def test_units_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="zip"):
        change.changes({"loss": [1.0, 2.0]}, {"loss": [1.0]})


def test_units_of_a_ratio_of_equal_parts_are_the_parts():
    assert change.of_ratio([(3, 1), (5, 1), (1, 1)]) == [3, 5, 1]
    assert change.of_ratio([(6, 2), (10, 2)]) == [3, 5]


def test_units_of_a_ratio_of_unequal_parts_spread_as_the_jackknife_says():
    rng = random.Random(1)
    counts = [rng.randint(1, 4) for _ in range(200)]
    parts = [(sum(rng.gauss(2, 1) for _ in range(n)), n) for n in counts]
    found = change.of_ratio(parts)
    total, number = sum(a for a, _ in parts), sum(counts)
    assert fmean(found) == pytest.approx(total / number)
    left_out = [(total - a) / (number - b) for a, b in parts]
    jackknife = sqrt((200 - 1) / 200 * sum((one - fmean(left_out)) ** 2 for one in left_out))
    assert stdev(found) / sqrt(200) == pytest.approx(jackknife, rel=0.03)
