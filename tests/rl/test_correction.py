"""Truncated importance sampling: weights by hand, and the loss of GRPO as TRL has it with its own sampler."""

import math

import pandas
import pytest
import torch

from tests.support import small_steps
from tests.support.rollouts import answers_of, fixed_reward
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.rl import correction, rewards, rollouts

SIZES = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 24}
CAP = 1.25


@pytest.fixture(scope="module")
def base(stammering_base):
    return stammering_base


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    return small_steps.instructions_slice(tmp_path_factory.mktemp("rows"), 40, "instructions")


def off(row, token):
    """What the sampler's log-probability of a token is below the trainer's, by a planted fault: -0.3 to 0.3."""
    return 0.1 * ((3 * row + token) % 7 - 3)


@pytest.fixture
def built(base, instructions, tmp_path, monkeypatch):
    """A trainer whose sampler says other log-probabilities than it drew by, if `fault`."""

    def make(method, cap=CAP, fault=True, **more):
        monkeypatch.setattr(rewards, "functions", lambda job, parents: {"fixed": fixed_reward})
        monkeypatch.setitem(small_steps.CONFIG.experiments[method], "reward", "fixed")
        trainer = small_steps.built_trainer(tmp_path, method, base, instructions, **SIZES, **more)
        trainer.sample_by("graphs", 384, 96)
        trainer.correct_by(cap)
        draw = type(trainer)._generate_single_turn

        def other(self, *given):
            found = draw(self, *given)
            if fault:
                self.sampled = [[p - off(row, n) for n, p in enumerate(one)] for row, one in enumerate(self.sampled)]
            return found

        monkeypatch.setattr(type(trainer), "_generate_single_turn", other)
        torch.manual_seed(7)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.data += 0.05 * torch.randn_like(parameter)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    return make


def sampled(trainer, cap):
    trainer.cap = cap
    torch.manual_seed(3)
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def test_a_weight_is_the_ratio_of_the_two_probabilities_and_never_above_the_cap():
    trainer = torch.tensor([[0.5, 0.2, 0.1], [0.3, 0.3, 0.9]]).log()
    sampler = torch.tensor([[0.5, 0.4, 0.01], [0.1, 0.2, 1.0]]).log()
    found = correction.weights(trainer, sampler, 3.0)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.5, 3.0], [3.0, 1.5, 0.9]]))


def test_grpo_weighs_each_token_and_its_loss_is_trls_with_its_own_sampler(built):
    trainer = built("grpo")
    plain, weighed = sampled(trainer, None), sampled(trainer, CAP)
    assert answers_of(plain) == answers_of(weighed) and plain["advantages"].dim() == 1
    wanted = torch.ones(weighed["completion_mask"].shape)
    for row, (_, answer) in enumerate(answers_of(plain)):
        for token in range(len(answer)):
            wanted[row, token] = min(math.exp(off(row, token)), CAP)
    torch.testing.assert_close(weighed["advantages"], plain["advantages"][:, None] * wanted, atol=1e-3, rtol=1e-3)
    counted = wanted[weighed["completion_mask"].bool()]
    assert trainer._metrics["train"]["sampler/weight"] == [pytest.approx(counted.mean().item(), abs=1e-3)]
    assert trainer._metrics["train"]["sampler/capped"] == [pytest.approx((counted == CAP).float().mean().item(), abs=1e-3)]

    def stepped(batch):
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        grads = [parameter.grad.clone() for parameter in trainer.model.parameters() if parameter.grad is not None]
        return loss.detach(), torch.cat([one.flatten() for one in grads])

    ours, without = stepped(weighed), stepped(plain)
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    theirs = stepped(plain | {"importance_sampling_ratio": wanted})
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=2e-3)
    assert (ours[1] - without[1]).norm() > 0.02 * without[1].norm()  # it does something


def test_rloo_weighs_each_answer_by_the_ratio_of_all_its_tokens(built):
    trainer = built("rloo")
    plain, weighed = sampled(trainer, None), sampled(trainer, CAP)
    ratios = [math.exp(sum(off(row, n) for n in range(len(answer)))) for row, (_, answer) in enumerate(answers_of(plain))]
    assert min(ratios) < 1 / CAP and max(ratios) > CAP
    wanted = plain["advantages"] * torch.tensor([min(one, CAP) for one in ratios])
    torch.testing.assert_close(weighed["advantages"], wanted, atol=1e-3, rtol=2e-3)
    assert weighed["advantages"].shape == plain["advantages"].shape


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_sampler_that_is_the_trainer_has_weights_of_one(built, method):
    trainer = built(method, fault=False)
    plain, weighed = sampled(trainer, None), sampled(trainer, CAP)
    before = plain["advantages"] if method == "rloo" else plain["advantages"][:, None].expand_as(weighed["advantages"])
    torch.testing.assert_close(weighed["advantages"], before, atol=2e-3, rtol=2e-3)
    assert trainer._metrics["train"]["sampler/weight"] == [pytest.approx(1, abs=1e-3)]


def test_held_out_prompts_are_not_weighed(built):
    trainer = built("grpo")
    trainer.model.eval()
    with torch.no_grad():
        batch = trainer._generate_and_score_completions(next(iter(trainer.get_eval_dataloader())))
    assert batch["advantages"].dim() == 1 and not trainer._metrics["train"].get("sampler/weight")


def test_a_sampler_without_log_probabilities_is_no_sampler_to_correct(built):
    trainer = built("grpo", cap=None)
    trainer.engine = None
    with pytest.raises(InputError, match="plain `generate` samples from this model, and gives no log-probabilities"):
        trainer.correct_by(3.0)
    trainer.correct_by(None)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_training_says_what_its_weights_were(method, base, instructions, tmp_path):
    few = {"max_steps": 2, "max_completion_length": 12, "per_device_train_batch_size": 8, "num_generations": 4}
    config = small_steps.CONFIG.experiments[method]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(config, "correction", 3.0)
        adapter = small_steps.train(tmp_path, method, base, instructions, **few)
    curves = pandas.read_csv(adapter.folder / "metrics.csv")
    assert curves["sampler/weight"].dropna().between(0.99, 1.01).all() and len(curves["sampler/weight"].dropna())
    assert set(rollouts.GAPS) <= set(curves.columns) and (curves["sampler/capped"].dropna() == 0).all()
