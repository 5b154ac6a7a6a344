"""Truncated importance sampling: GRPO and RLOO where who samples is not quite who is trained (`generation.correct: truncated`).

Answers are drawn by the generator, whose log-probabilities differ a little from the trainer's: another precision, other kernels.
So what is called on-policy is drawn from mu, not from pi, and the gradient is that of another expectation. Weighing each draw by
pi / mu gives back the right one; bounding the weight, min(pi / mu, C), keeps its variance finite at the price of a little bias
(Ionides 2008, "Truncated Importance Sampling"; for this gap Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
Off-Policy RL Training"). pi is the trainer's when the answers are drawn, and the weight is a constant of the loss: the ratio of
the method itself, of the policy now to the policy then, is another one and stays as it is.

    GRPO    a weight for each token, as TRL has it for its own vLLM sampler (`vllm_importance_sampling_mode: token_truncate`).
            There it multiplies the token's loss before the KL; its losses are proportional to the advantage, so here it
            multiplies the advantage
    RLOO    a weight for each answer, min(prod of the tokens' pi / mu, C): its ratio is that of whole answers, and an answer is
            what its baseline is of. TRL's RLOO corrects nothing

In PPO nothing is corrected. Logged: `sampler/weight`, the mean of the weights, and `sampler/capped`, the share that met C.
"""

from typing import Any

import torch
from torch import Tensor

from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.rl import rollouts


def weights(trainer: Tensor, sampler: Tensor, cap: float) -> Tensor:
    """min(pi / mu, cap), from log-probabilities."""
    return (trainer - sampler).exp().clamp(max=cap)


class Corrected:
    """Before a trainer of rl/rollouts.py. Until `correct_by`, nothing is weighed."""

    cap: float | None = None

    def correct_by(self: Any, cap: float | None) -> None:
        """InputError where the sampler says no log-probabilities: it would go on without a word."""
        if cap is not None and self.engine is None:
            raise InputError(
                "generation.correct: truncated, but plain `generate` samples from this model, and gives no log-probabilities of "
                "its draws; set generation.correct: none"
            )
        self.cap = cap

    def _generate_and_score_completions(self: Any, inputs: Any) -> Any:
        batch = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if self.model.training and self.cap is not None:
            self._weigh(batch)
        return batch

    @torch.no_grad()
    def _weigh(self: Any, batch: dict) -> None:
        mask = batch["completion_mask"].bool()
        sampler = torch.zeros(mask.shape, device=mask.device)
        for row, likely in zip(sampler, self.sampled, strict=True):
            row[: len(likely)] = torch.tensor(likely)
        found = self._weights(batch, sampler, mask)
        counted = found[mask] if found.shape == mask.shape else found
        self._metrics["train"]["sampler/weight"].append(counted.mean().item())
        self._metrics["train"]["sampler/capped"].append((counted >= self.cap).float().mean().item())


class GRPO(Corrected, rollouts.GRPO):
    """With a weight for each token."""

    def _weights(self: Any, batch: dict, sampler: Tensor, mask: Tensor) -> Tensor:
        """Weighs the advantages in place: (answers,) become (answers, tokens). What is no answer's keeps them."""
        there = batch.get("old_per_token_logps")
        if there is None:  # a pass over the rollout, which TRL spares where each answer is trained on once
            ids, attention = (
                torch.cat([batch[f"{part}_{kind}"] for part in ("prompt", "completion")], 1) for kind in ("ids", "mask")
            )
            with self.compute_loss_context_manager():
                size = self.args.per_device_train_batch_size
                there = self._get_per_token_logps_and_entropies(self.model, ids, attention, mask.shape[1], size)[0]
        found = weights(torch.where(mask, there.float(), sampler), sampler, self.cap)
        batch["advantages"] = batch["advantages"][:, None] * found
        return found


class RLOO(Corrected, rollouts.RLOO):
    """With a weight for each answer."""

    def _weights(self: Any, batch: dict, sampler: Tensor, mask: Tensor) -> Tensor:
        found = weights(batch["old_logps"].float(), (sampler * mask).sum(1), self.cap)
        batch["advantages"] = batch["advantages"] * found
        return found
