"""The mathematics of PPO on tokens: rewards, advantages, the value loss, and how well the values explain the returns.

All arguments are tensors of shape (answers, tokens) unless said otherwise, in fp32; `mask` is 1 at the tokens of an answer, its
end of turn included, and 0 at the padding behind it. A value belongs to the state before its token: V(s_t), s_t = prompt and
answer up to token t - 1.

Sources: Schulman et al. 2016 (arXiv:1506.02438), 2017 (arXiv:1707.06347); Ziegler et al. 2019 (arXiv:1909.08593); Huang et al.
2024 (arXiv:2403.17031).
"""

import torch
from torch import Tensor

WHITEN_EPSILON = 1e-8  # under the variance, as in the implementations that Huang et al. 2024 reproduce
KL_STEP = 0.1  # K_beta of Ziegler et al. 2019, section 2.2
KL_ERROR = 0.2  # the proportional error is clipped to this, ibid.


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of all answers together: a scalar."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the tokens of all answers, var with n - 1; without `shift_mean` the mean is added again.

    Huang et al. 2024, detail "advantage whitening" (with the mean) and "reward whitening" (without).
    """
    mean = masked_mean(values, mask)
    n = mask.sum()
    variance = ((values - mean) ** 2 * mask).sum() / (n - 1).clamp(min=1)
    whitened = (values - mean) * torch.rsqrt(variance + WHITEN_EPSILON)
    return (whitened if shift_mean else whitened + mean) * mask


def token_rewards(scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef (log pi(a_t|s_t) - log ref(a_t|s_t)), and the answer's score on top at its last real token.

    Ziegler et al. 2019, eq. 2, per token; the estimate of the KL is k1, the log ratio itself, whose mean is the KL. scores:
    (answers,).
    """
    rewards = -kl_coef * (logps - ref_logps) * mask
    last = mask.sum(dim=1).long() - 1
    rewards[torch.arange(len(rewards), device=rewards.device), last] += scores
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns) by generalised advantage estimation (Schulman et al. 2016, eqs. 11, 12 and 16).

    delta_t = r_t + gamma V(s_t+1) - V(s_t), with V = 0 behind the last token; A_t = delta_t + gamma lam A_t+1; the return that
    the value function is trained towards is A_t + V(s_t).
    """
    values, rewards = values * mask, rewards * mask
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])  # A_t+1
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(following)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        advantages[:, t] = following
    return advantages, advantages + values


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(loss, share of tokens at which the clipped term is the larger one).

    0.5 mean max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2), the mean over tokens: the pessimistic clipping of
    the value function that Huang et al. 2024 describe ("value function loss clipping").
    """
    clipped = torch.clamp(values, old_values - clip, old_values + clip)
    plain, limited = (values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * masked_mean(torch.max(plain, limited), mask)
    return loss, masked_mean((limited > plain).float(), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(R - V) / Var(R) over the tokens: 1 for a perfect value function, 0 for a constant, below 0 for a harmful one.

    NaN where the returns do not vary.
    """
    picked, target = values[mask.bool()], returns[mask.bool()]
    variance = target.var()
    return float("nan") if len(target) < 2 or variance == 0 else float(1 - (target - picked).var() / variance)


def adapted_kl_coef(kl_coef: float, kl: float, target: float) -> float:
    """The next rollout's coefficient: kl_coef (1 + 0.1 clip((kl - target) / target, -0.2, 0.2)).

    kl: the mean of an answer, in nats.

    Ziegler et al. 2019, section 2.2.
    """
    return kl_coef * (1 + KL_STEP * max(-KL_ERROR, min(KL_ERROR, (kl - target) / target)))
