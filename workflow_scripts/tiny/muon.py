"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), in fp32 and for all matrices of one shape at once.

The update is the momentum U S V^T with its singular values brought near 1: `newton_schulz_steps` times the quintic
p(s) = a s + b s^3 + c s^5 on all of them, by products of matrices alone.

Departures from torch.optim.Muon, whose learning rates hold here as well:

- It computes in fp32, not in bf16. Processors without bf16 products do those in a slow loop, which took five sixths of the
  time, and where there are such products they differ from processor to processor.
- The iterations run on the small Gram matrix. With A = X X^T, p takes X to Q X, with Q = a + b A + c A^2, and A to Q A Q. All Q
  are polynomials of one A and commute, so the long side is touched twice and not twice in each step.
"""

from collections.abc import Sequence

import torch

QUINTIC = 3.4445, -4.7750, 2.0315  # Jordan's a, b, c: singular values above 0.01 or so come to 0.7 to 1.2 in five steps
MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for matrices alone."""

    def __init__(self, matrices: Sequence[torch.nn.Parameter], lr: float, weight_decay: float, newton_schulz_steps: int) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "newton_schulz_steps": newton_schulz_steps})
        shapes: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        for matrix in matrices:
            shapes.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
        self.groups = [(together, torch.zeros(len(together), *shape)) for shape, together in shapes.items()]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        for matrices, momentum in self.groups:
            gradients = torch.stack([_wide(matrix.grad) for matrix in matrices if matrix.grad is not None])
            momentum.lerp_(gradients, 1 - MOMENTUM)
            updates = orthogonal(gradients.lerp(momentum, MOMENTUM), group["newton_schulz_steps"])
            for matrix, update in zip(matrices, updates, strict=True):
                tall = max(1.0, matrix.size(0) / matrix.size(1)) ** 0.5
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                _wide(matrix).add_(update, alpha=-group["lr"] * tall)


def orthogonal(matrices: torch.Tensor, steps: int) -> torch.Tensor:
    """`matrices` (N, m, n), m <= n, with the same singular vectors and singular values near 1, after `steps` (from 1)."""
    matrices = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    gram = matrices @ matrices.mT
    whole = factor = _quintic(gram)
    for _ in range(steps - 1):
        gram = factor @ gram @ factor
        factor = _quintic(gram)
        whole = factor @ whole
    return whole @ matrices


def _quintic(gram: torch.Tensor) -> torch.Tensor:
    """a + b A + c A^2 for each A of `gram`: what p multiplies X by, where A = X X^T."""
    a, b, c = QUINTIC
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor


def _wide(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.size(0) <= matrix.size(1) else matrix.T
