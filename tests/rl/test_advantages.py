"""The mathematics of PPO against values worked by hand: sums written out, not the recursions that the module uses."""

import math

import pytest
import torch

from workflow_scripts.rl import advantages as ppo

# Two answers: of three tokens, and of two with one of padding.
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
REWARDS = torch.tensor([[0.1, -0.2, 1.0], [0.3, 2.0, 9.0]])
VALUES = torch.tensor([[0.5, 0.4, 0.2], [-0.1, 0.6, 7.0]])


def test_gae_is_the_sum_of_discounted_deltas():
    """A_t = sum over l of (gamma lam)^l delta_t+l (Schulman et al. 2016, eq. 16); what the padding holds does not matter."""
    found, returns = ppo.gae(REWARDS, VALUES, MASK, gamma=0.9, lam=0.8)
    first = [0.1 + 0.9 * 0.4 - 0.5, -0.2 + 0.9 * 0.2 - 0.4, 1.0 - 0.2]
    second = [0.3 + 0.9 * 0.6 + 0.1, 2.0 - 0.6]
    wanted = [
        [first[0] + 0.72 * first[1] + 0.72**2 * first[2], first[1] + 0.72 * first[2], first[2]],
        [second[0] + 0.72 * second[1], second[1], 0.0],
    ]
    assert torch.allclose(found, torch.tensor(wanted), atol=1e-6)
    assert torch.allclose(returns, (torch.tensor(wanted) + VALUES) * MASK, atol=1e-6)


def test_with_lambda_1_the_return_is_the_discounted_reward_to_come_and_with_0_one_step():
    _, to_come = ppo.gae(REWARDS, VALUES, MASK, gamma=0.9, lam=1.0)
    assert to_come[0].tolist() == pytest.approx([0.1 - 0.9 * 0.2 + 0.81, -0.2 + 0.9, 1.0])
    assert to_come[1].tolist() == pytest.approx([0.3 + 0.9 * 2.0, 2.0, 0.0])
    _, one_step = ppo.gae(REWARDS, VALUES, MASK, gamma=0.9, lam=0.0)
    assert one_step[0].tolist() == pytest.approx([0.1 + 0.9 * 0.4, -0.2 + 0.9 * 0.2, 1.0])


def test_each_token_pays_its_log_ratio_and_the_last_real_one_gets_the_score():
    logps = torch.tensor([[-1.0, -2.0, -0.5], [-0.3, -0.4, -9.0]])
    reference = torch.tensor([[-1.5, -1.0, -0.5], [-0.3, -0.9, -1.0]])
    found = ppo.token_rewards(torch.tensor([3.0, -1.0]), logps, reference, MASK, kl_coef=0.1)
    assert found[0].tolist() == pytest.approx([-0.05, 0.1, 3.0])
    assert found[1].tolist() == pytest.approx([0.0, -1.0 - 0.05, 0.0])


def test_whitening_is_over_the_real_tokens_of_all_answers():
    found = ppo.whiten(REWARDS, MASK)
    real = [0.1, -0.2, 1.0, 0.3, 2.0]
    mean = sum(real) / 5
    sd = math.sqrt(sum((x - mean) ** 2 for x in real) / 4)
    assert found[MASK.bool()].tolist() == pytest.approx([(x - mean) / sd for x in real], rel=1e-5)
    assert found[1, 2] == 0
    kept = ppo.whiten(REWARDS, MASK, shift_mean=False)
    assert kept[MASK.bool()].mean().item() == pytest.approx(mean, rel=1e-5) and kept[1, 2] == 0


def test_the_value_loss_takes_the_worse_of_the_value_and_of_the_value_clipped_to_the_old_one():
    values = torch.tensor([[1.0, 0.0, 0.5], [2.0, 0.1, 50.0]], requires_grad=True)
    old = torch.tensor([[0.0, 0.0, 0.5], [0.0, 0.0, 0.0]])
    returns = torch.tensor([[1.0, 1.0, 0.0], [-1.0, 0.1, 0.0]])
    # By token: clipped to 0.2 and so 0.64 off; 1.0 off; 0.25; plain 9 against clipped 1.44; exact.
    loss, clipped = ppo.value_loss(values, old, returns, MASK, clip=0.2)
    assert loss.item() == pytest.approx(0.5 * (0.64 + 1.0 + 0.25 + 9.0 + 0.0) / 5)
    assert clipped.item() == pytest.approx(1 / 5)
    loss.backward()
    # Where the clipped term is the worse one, the value is already past the limit: no gradient. None from the padding.
    assert values.grad.flatten().tolist() == pytest.approx([0.0, -1.0 / 5, 0.5 / 5, 3.0 / 5, 0.0, 0.0])


def test_explained_variance():
    returns = torch.tensor([[1.0, 2.0, 4.0], [0.0, 3.0, 99.0]])
    assert ppo.explained_variance(returns, returns, MASK) == pytest.approx(1.0)
    assert ppo.explained_variance(torch.full_like(returns, 7.0), returns, MASK) == pytest.approx(0.0)
    assert ppo.explained_variance(-returns, returns, MASK) == pytest.approx(-3.0)
    assert math.isnan(ppo.explained_variance(returns, torch.ones_like(returns), MASK))


@pytest.mark.parametrize(("kl", "wanted"), [(6.0, 0.1), (6.6, 0.1 * 1.01), (60.0, 0.1 * 1.02), (0.0, 0.1 * 0.98)])
def test_the_kl_coefficient_moves_towards_the_target_by_a_fiftieth_at_most(kl, wanted):
    assert ppo.adapted_kl_coef(0.1, kl, target=6.0) == pytest.approx(wanted)
