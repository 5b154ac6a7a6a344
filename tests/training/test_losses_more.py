"""DPO's other losses, their weighted sums, and GRPO's cispo and sapo, as the steps train them, against values worked by hand."""

import numpy
import pytest
import torch

from tests.support import small_steps
from tests.support.rollouts import answers_of, log_probs, plain
from tests.training import test_losses, test_losses_rollouts
from tests.training.test_losses_rollouts import BETA as KL
from tests.training.test_losses_rollouts import k3


def softplus(x):
    return numpy.log1p(numpy.exp(x))


# -- DPO --------------------------------------------------------------------------------------------------------------

BETA = 0.1
MPO = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}


@pytest.fixture(scope="module")
def by_hand(folder, base, pairs):
    """Loss -> its value on one batch, from log-probabilities of a policy that has moved and its reference."""
    trainer = small_steps.built_trainer(folder / "by_hand", "dpo", base, pairs)
    test_losses.stir(trainer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    policy, reference = test_losses.plain_models(trainer, base, folder)
    mask = batch["completion_mask"][:, 1:].numpy()
    tokens = test_losses.log_probs(policy, batch) * mask
    now, then = tokens.sum(1), (test_losses.log_probs(reference, batch) * mask).sum(1)
    (chosen, rejected), (one, other) = numpy.split(now - then, 2), (numpy.subtract(*numpy.split(x, 2)) for x in (now, then))
    losses = {
        "sigmoid": softplus(-BETA * (chosen - rejected)).mean(),
        "bco_pair": (softplus(-BETA * chosen) + softplus(BETA * rejected)).mean(),
        "sppo_hard": ((chosen - 0.5 / BETA) ** 2 + (rejected + 0.5 / BETA) ** 2).mean(),
        "aot": softplus(-BETA * (numpy.sort(one) - numpy.sort(other))).mean(),
        "sft": -tokens[:6].sum() / mask[:6].sum(),
    }
    assert numpy.abs(chosen - rejected).min() > 1e-3 and (one.argsort() != other.argsort()).any()  # aot pairs them anew
    assert len(set(numpy.round(list(losses.values()), 5))) == 5
    return losses | {"mpo": 0.8 * losses["sigmoid"] + 0.2 * losses["bco_pair"] + losses["sft"]}


@pytest.mark.parametrize("name", ["bco_pair", "sppo_hard", "aot", "mpo"])
def test_a_loss_of_dpo_equals_the_one_worked_by_hand(base, pairs, tmp_path, by_hand, name):
    settings = MPO if name == "mpo" else {"loss_type": name}
    trainer = small_steps.built_trainer(tmp_path, "dpo", base, pairs, **settings)
    test_losses.stir(trainer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    trainer.model.eval()
    with torch.no_grad():
        assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(by_hand[name], rel=1e-5)
    assert all(by_hand[name] != pytest.approx(value, rel=1e-5) for other, value in by_hand.items() if other != name)


# -- GRPO -------------------------------------------------------------------------------------------------------------


def of_a_token(loss, ratio, advantage, logps):
    if loss == "cispo":
        return -numpy.minimum(ratio, 1.05) * advantage * logps
    temperature = 0.5 if advantage > 0 else 2.0
    return -4 / temperature / (1 + numpy.exp(-temperature * (ratio - 1))) * advantage


@pytest.mark.trained
@pytest.mark.parametrize(
    ("loss", "settings"),
    [("cispo", {"epsilon_high": 1.05}), ("sapo", {"sapo_temperature_pos": 0.5, "sapo_temperature_neg": 2.0})],
)
def test_a_loss_of_grpo_equals_the_one_worked_by_hand(stammering_base, instructions, tmp_path, loss, settings):
    base = stammering_base
    trainer = test_losses_rollouts.built(tmp_path, base, instructions, "grpo", loss_type=loss, **settings)
    test_losses_rollouts.stir(trainer, 7, 0.05)
    rollout = test_losses_rollouts.sampled(trainer)
    answers, policies = answers_of(rollout), []
    for name in ("sampled by", "moved"):
        trainer.model.save_pretrained(tmp_path / name)
        policies.append(plain(base, tmp_path / name))
        test_losses_rollouts.stir(trainer, 8, 0.05)
    with torch.no_grad():
        old, new, ref = ([log_probs(one, *answer).numpy() for answer in answers] for one in (*policies, plain(base)))
    advantages = rollout["advantages"].tolist()  # by hand in test_losses_rollouts.py
    costs, ratios = [], []
    for after, before, reference, advantage in zip(new, old, ref, advantages, strict=True):
        ratios.append(numpy.exp(after - before))
        costs.append(of_a_token(loss, ratios[-1], advantage, after) + KL * k3(reference, after))
    assert (numpy.concatenate(ratios) > 1.05).any() and min(advantages) < 0 < max(advantages)
    wanted = numpy.concatenate(costs).mean() if loss == "cispo" else numpy.mean([cost.mean() for cost in costs])
    rollout["old_per_token_logps"] = torch.zeros(rollout["completion_ids"].shape)
    for i, logps in enumerate(old):
        rollout["old_per_token_logps"][i, : len(logps)] = torch.tensor(logps)
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(trainer.model, load_file(tmp_path / "moved" / "adapter_model.safetensors"))
    with torch.no_grad():
        assert trainer._compute_loss(trainer.model, rollout).item() == pytest.approx(wanted, rel=1e-4)
