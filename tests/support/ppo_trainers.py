"""PPO's trainer as the step builds it, and a first rollout of it: for test_ppo.py and test_ppo_on_trl.py."""

import pytest
import torch

from tests.support import small_steps
from tests.support.rollouts import fixed_reward
from workflow_scripts.rl import rewards

PPO = small_steps.CONFIG.experiments["ppo"]["ppo"]
SIZES = {"per_device_train_batch_size": 4, "steps_per_generation": 3, "num_iterations": 2, "max_completion_length": 32}


def built(place, base, slice_, reward=fixed_reward, quantise="none", **more):
    """PPO's trainer with a reward of ours."""
    ppo = PPO | {key: more.pop(key) for key in set(more) & set(PPO)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards, "functions", lambda job, parents, on_backbone: {"ifeval": reward})
        trainer = small_steps.built_trainer(place, "ppo_ifeval", base, slice_, quantise=quantise, ppo=ppo, **{**SIZES, **more})
    trainer.current_gradient_accumulation_steps = 1  # set by the loop of training
    trainer.create_optimizer()
    return trainer


def with_rm(place, base, slice_, rm, quantise="none", **more):
    trainer = built(place, base, slice_, quantise=quantise, **more)
    trainer.add_reward_model("rm", rm[quantise])
    return trainer


def stir(trainer, adapter, seed=7, std=0.05):
    """Add to an adapter's B, zero at the start."""
    torch.manual_seed(seed)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name and f".{adapter}." in name:
            parameter.data += std * torch.randn_like(parameter)


def batch_of(trainer, seed=3):
    """The prompts of the first rollout: twelve, one answer each."""
    trainer.model.train()
    torch.manual_seed(seed)
    prompts = next(iter(trainer.get_train_dataloader()))
    assert len(prompts) == len({row["prompt"][0]["content"] for row in prompts}) == 12
    return prompts


def sampled(trainer, seed=3):
    return trainer._generate_and_score_completions(batch_of(trainer, seed))


def step(trainer, prompts):
    return trainer.training_step(trainer.model, prompts)
