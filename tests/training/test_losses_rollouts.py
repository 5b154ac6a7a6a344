"""Advantages, KL and losses of GRPO and RLOO as the steps train them, against values worked by hand on sampled answers.

The answers are really sampled, from a model with an adapter that does something; rewards are a fixed function of their tokens.
By hand: each answer alone, without padding, through a plainly loaded model, and the rest by numpy.
"""

from types import SimpleNamespace

import numpy
import pytest
import torch

from tests.support import small_steps
from tests.support.rollouts import answers_of, fixed_reward, log_probs, plain
from workflow_scripts.rl import rewards

pytestmark = pytest.mark.trained  # what is compared is worked by hand, but that there is something to compare, the base decides
BETA = 0.3  # large, so that a KL left out or doubled would show
G = 4
SIZES = {"per_device_train_batch_size": 12, "num_generations": G, "max_completion_length": 32, "beta": BETA}


@pytest.fixture(scope="module")
def base(stammering_base):
    return stammering_base


def stir(trainer, seed, std):
    """Add to the adapter's B, zero at the start."""
    torch.manual_seed(seed)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data += std * torch.randn_like(parameter)


def built(place, base, instructions, method, quantise="none", **more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards, "functions", lambda job, parents: {"fixed": fixed_reward})
        patch.setitem(small_steps.CONFIG.experiments[method], "reward", "fixed")
        return small_steps.built_trainer(place, method, base, instructions, quantise=quantise, **SIZES, **more)


def sampled(trainer):
    """A rollout of the first batch of prompts, three prompts with four answers each, as training would take it."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by the loop of training
    torch.manual_seed(3)
    prompts = next(iter(trainer.get_train_dataloader()))
    assert len(prompts) == 12 and len({row["prompt"][0]["content"] for row in prompts}) == 3
    return trainer._generate_and_score_completions(prompts)


# GRPO as the paper has it, and with TRL's correction, which multiplies the KL by the ratio and so changes its gradient.
CASES = {"grpo": {"use_bias_correction_kl": False}, "grpo corrected": {"use_bias_correction_kl": True}, "rloo": {}}


@pytest.fixture(scope="module", params=CASES)
def case(request, folder, base, instructions):
    """A method with its trainer, a rollout, and by hand: answers, log-probs under policy and reference, rewards by group."""
    place, method = folder / request.param, request.param.split()[0]
    trainer = built(place, base, instructions, method, **CASES[request.param])
    stir(trainer, 7, 0.05)
    trainer.model.save_pretrained(place / "stirred")
    rollout = sampled(trainer)
    answers, policy = answers_of(rollout), plain(base, place / "stirred")
    with torch.no_grad():
        policy_logps = [log_probs(policy, *one).numpy() for one in answers]
        reference_logps = [log_probs(plain(base), *one).numpy() for one in answers]
    prompts = [[{"role": "user", "content": str(prompt)}] for prompt, _ in answers]
    given = numpy.array(fixed_reward(prompts, None, [answer for _, answer in answers])).reshape(-1, G)
    assert len({len(answer) for _, answer in answers}) > 3 and (given[0] == 1).all() and (given[1:].std(1) > 0).all()
    return SimpleNamespace(
        method=method, trainer=trainer, rollout=rollout, answers=answers, policy=policy, rewards=given,
        logps=policy_logps, ref=reference_logps, place=place, corrected="corrected" in request.param,
    )  # fmt: skip


def k3(ref, logps):
    return numpy.exp(ref - logps) - (ref - logps) - 1


def advantages_by_hand(case):
    if case.method == "grpo":
        mean, std = case.rewards.mean(1, keepdims=True), case.rewards.std(1, ddof=1, keepdims=True)
        return ((case.rewards - mean) / (std + 1e-4)).ravel()
    kl = numpy.array([(logps - ref).sum() for logps, ref in zip(case.logps, case.ref, strict=True)]).reshape(-1, G)
    penalised = case.rewards - BETA * kl
    assert numpy.abs(kl).max() > 0.1
    others = [[numpy.delete(group, i).mean() for i in range(G)] for group in penalised]
    return (penalised - others).ravel()


def test_the_advantages_equal_those_worked_by_hand(case):
    wanted = advantages_by_hand(case)
    assert case.rollout["advantages"].tolist() == pytest.approx(wanted.tolist(), rel=1e-4, abs=1e-5)
    assert case.trainer._metrics["train"]["reward"][-1] == pytest.approx(case.rewards.mean())  # before any penalty
    assert case.trainer._metrics["train"]["frac_reward_zero_std"][-1] <= 1 / 3 + 1e-6


def test_a_group_of_equal_rewards_teaches_nothing_but_the_pull_to_the_reference(case):
    advantages = case.rollout["advantages"][:G]
    if case.method == "grpo":  # the KL is in the loss, not in the reward
        assert advantages.tolist() == [0] * G
    else:  # what is left of an advantage is the penalty alone, and none without it
        kl = numpy.array([(a - b).sum() for a, b in zip(case.logps[:G], case.ref[:G], strict=True)])
        wanted = -BETA * (kl - (kl.sum() - kl) / (G - 1))
        assert advantages.tolist() == pytest.approx(wanted.tolist(), rel=1e-3, abs=1e-5)
    others = case.rollout["advantages"][G:].reshape(-1, G)  # an answer with the mean of its group has none
    assert (others.abs().amax(1) > 0).all()


def test_without_a_penalty_a_group_of_equal_rewards_has_no_advantage_in_rloo(base, instructions, tmp_path):
    trainer = built(tmp_path, base, instructions, "rloo")
    trainer.beta = 0.0
    stir(trainer, 7, 0.05)
    rollout = sampled(trainer)
    assert rollout["advantages"][:G].tolist() == [0] * G and rollout["advantages"][G:].abs().max() > 0


def loss_by_hand(case, logps, old, advantages):
    """The loss, from log-probs of each answer's tokens now, and when they were sampled."""
    losses = []
    for new, before, ref, advantage in zip(logps, old, case.ref, advantages, strict=True):
        ratio = numpy.exp(new - before) if case.method == "grpo" else numpy.exp((new - before).sum())
        surrogate = -numpy.minimum(ratio * advantage, numpy.clip(ratio, 0.8, 1.2) * advantage)
        kl = k3(ref, new) * (ratio if case.corrected else 1)
        losses.append((surrogate + BETA * kl).mean() if case.method == "grpo" else surrogate)
    return numpy.mean(losses)


def test_the_loss_at_first_visit_equals_the_one_worked_by_hand_and_its_gradient_that_of_log_probs(case):
    """At a ratio of 1 the gradient is that of -A log pi (and of the KL), the mean over an answer's tokens first in GRPO."""
    trainer, advantages = case.trainer, advantages_by_hand(case)
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, case.rollout)
    assert loss.item() == pytest.approx(loss_by_hand(case, case.logps, case.logps, advantages), rel=1e-4, abs=1e-6)
    loss.backward()
    case.policy.zero_grad()
    total = 0.0
    for (prompt, answer), ref, advantage in zip(case.answers, case.ref, advantages, strict=True):
        logps = log_probs(case.policy, prompt, answer)
        if case.method == "grpo":
            log_ratio = torch.tensor(ref) - logps
            kl = log_ratio.exp() - log_ratio - 1
            kl = kl * (logps - logps.detach()).exp() if case.corrected else kl
            total = total + (-advantage * logps + BETA * kl).mean() / len(case.answers)
        else:
            total = total - advantage * logps.sum() / len(case.answers)
    total.backward()
    wanted = {name: p.grad for name, p in case.policy.named_parameters() if "lora_B" in name}
    found = {name: p.grad for name, p in trainer.model.named_parameters() if "lora_B" in name}
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 1e-6
        assert torch.allclose(found[name], gradient.float(), rtol=1e-3, atol=1e-3 * gradient.abs().max().item()), name


def test_the_ratio_is_clipped_once_the_policy_has_moved(case, base):
    trainer, advantages = case.trainer, advantages_by_hand(case)
    rollout = dict(case.rollout)
    if case.method == "grpo":  # with one visit to each rollout the trainer keeps no log-probs of the sampling
        assert rollout.get("old_per_token_logps") is None
        old = torch.zeros(rollout["completion_ids"].shape)
        for i, logps in enumerate(case.logps):
            old[i, : len(logps)] = torch.tensor(logps)
        rollout["old_per_token_logps"] = old
    kept = {name: p.data.clone() for name, p in trainer.model.named_parameters() if "lora_B" in name}
    try:
        stir(trainer, 8, 0.05)
        trainer.model.save_pretrained(case.place / "moved")
        moved = plain(base, case.place / "moved")
        with torch.no_grad():
            loss = trainer._compute_loss(trainer.model, rollout).item()
            logps = [log_probs(moved, *one).numpy() for one in case.answers]
    finally:
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name:
                p.data = kept[name]
    ratios = [
        numpy.exp(a - b) if case.method == "grpo" else numpy.exp((a - b).sum()) for a, b in zip(logps, case.logps, strict=True)
    ]
    # A random move makes most of the sampled answers less likely, with long ones all. The clip acts where it is on the good side.
    assert any((ratio > 1.2).any() if a > 0 else (ratio < 0.8).any() for ratio, a in zip(ratios, advantages, strict=True))
    assert loss == pytest.approx(loss_by_hand(case, logps, case.logps, advantages), rel=1e-4)


def test_the_kl_of_grpo_is_the_papers_and_not_one_that_trl_corrects_by_default(base, instructions, tmp_path):
    assert built(tmp_path, base, instructions, "grpo").args.use_bias_correction_kl is False


@pytest.mark.parametrize("quantise", ["none", "nf4"])
@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_the_ratio_is_1_at_first_visit_so_dropout_is_off(base, instructions, tmp_path, method, quantise):
    trainer = built(tmp_path, base, instructions, method, quantise=quantise)
    stir(trainer, 7, 0.05)
    rollout = sampled(trainer)
    assert trainer.model.training
    ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], 1)
    mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], 1)
    width = rollout["completion_ids"].shape[1]
    with torch.no_grad():
        once, again = (trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)[0] for _ in range(2))
    assert torch.equal(once, again)
    if method == "rloo":
        now = (trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)[0] * rollout["completion_mask"]).sum(1)
        assert now.requires_grad
        assert torch.exp(now - rollout["old_logps"]).tolist() == pytest.approx([1.0] * 12, abs=1e-5)
    trainer._compute_loss(trainer.model, rollout)
    assert trainer._metrics["train"]["clip_ratio/region_mean"][-1] == 0


def test_a_mixture_of_rewards_is_their_weighted_sum(base, instructions, tmp_path):
    """`reward: {rm: 0.5, ifeval: 2.0}`: each advantage is that of the sum, not the sum of advantages."""

    def ends(prompts, completions, completion_ids, **columns):
        return [float(len(ids) < 24) for ids in completion_ids]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards, "functions", lambda job, parents: {"fixed": fixed_reward, "ends": ends})
        patch.setitem(small_steps.CONFIG.experiments["grpo"], "reward", {"fixed": 0.5, "ends": 2.0})
        trainer = small_steps.built_trainer(tmp_path, "grpo", base, instructions, quantise="none", **SIZES)
    rollout = sampled(trainer)
    answers = answers_of(rollout)
    prompts = [[{"role": "user", "content": str(prompt)}] for prompt, _ in answers]
    ids = [answer for _, answer in answers]
    total = 0.5 * numpy.array(fixed_reward(prompts, None, ids)) + 2.0 * numpy.array(ends(prompts, None, ids))
    grouped = total.reshape(-1, G)
    wanted = (grouped - grouped.mean(1, keepdims=True)) / (grouped.std(1, ddof=1, keepdims=True) + 1e-4)
    assert 0 < sum(ends(prompts, None, ids)) < 12
    assert rollout["advantages"].tolist() == pytest.approx(wanted.ravel().tolist(), rel=1e-4, abs=1e-5)
