"""What PPO builds on in TRL and transformers, private methods among it: each is named here when it disappears or changes."""

import inspect
import math

import pytest
import torch

from tests.support.ppo_trainers import built, sampled, stir

SIGNATURES = {
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "_generate_and_score_completions": ["inputs"],
    "_generate_single_turn": ["prompt_ids", "images", "multimodal_fields", "num_generations", ...],
    "_prepare_inputs": ["generation_batch"],
    "_compute_loss": ["model", "inputs"],
    "_get_per_token_logps_and_entropies": [
        "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy", ...],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "log": ["logs", "start_time"],
    "create_optimizer": ["model"],
    "_clip_grad_norm": ["model"],
    "_save": ["output_dir", "state_dict"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "get_optimizer_cls_and_kwargs": ["args", "model"],
    "compute_loss_context_manager": [],
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_method_of_trl_that_ppo_builds_on_is_as_it_was(name):
    from trl import GRPOTrainer

    method = getattr(GRPOTrainer, name, None)
    assert method is not None, f"GRPOTrainer.{name} is gone: rl/ppo_trainer.py builds on it"
    wanted = SIGNATURES[name]
    found = [one for one in inspect.signature(method).parameters if one != "self"]
    if ... in wanted:
        found = found[: len(wanted) - 1] + [...]
    assert found == wanted, f"GRPOTrainer.{name} takes other arguments than rl/ppo_trainer.py expects"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_step", int), ("_buffered_inputs", type(None)), ("_metrics", dict), ("num_iterations", int), ("num_generations", int),
        ("eos_token_ids", list), ("reward_weights", torch.Tensor), ("accelerator", object),
    ],
)  # fmt: skip
def test_an_attribute_of_trl_that_ppo_builds_on_is_there(base, instructions, tmp_path, name, kind):
    trainer = built(tmp_path, base, instructions)
    assert hasattr(trainer, name), f"GRPOTrainer has no {name} any more: rl/ppo_trainer.py builds on it"
    assert isinstance(getattr(trainer, name), kind), name


def test_trls_loss_takes_advantages_by_token_and_the_log_probs_of_the_sampling(base, instructions, tmp_path):
    """Advantages of shape (answers, tokens) are used as they are; a ratio against `old_per_token_logps`."""
    trainer = built(tmp_path, base, instructions)
    stir(trainer, "default")
    rollout = sampled(trainer)
    once = trainer._compute_loss(trainer.model, rollout).item()
    rollout["advantages"] = 2 * rollout["advantages"]
    assert trainer._compute_loss(trainer.model, rollout).item() == pytest.approx(2 * once, rel=1e-4)
    rollout["old_per_token_logps"] = rollout["old_per_token_logps"] - 1.0  # the ratio is e everywhere
    mask, advantage = rollout["completion_mask"], rollout["advantages"]
    wanted = -torch.minimum(math.e * advantage, 1.2 * advantage)
    assert trainer._compute_loss(trainer.model, rollout).item() == pytest.approx(
        ((wanted * mask).sum() / mask.sum()).item(), rel=1e-3
    )
