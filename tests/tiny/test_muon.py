"""Our Muon against torch's, and what it is for: singular values near 1, on matrices of every shape and of low rank."""

import pytest
import torch

from workflow_scripts.tiny import muon

SHAPES = ((64, 128), (128, 64), (96, 96), (96, 96))  # wide, tall, and two that are updated together


@pytest.fixture
def draws():
    return torch.Generator().manual_seed(3)


def test_it_steps_as_torchs_does_but_for_the_rounding_to_bf16(draws):
    theirs = [torch.nn.Parameter(torch.randn(shape, generator=draws)) for shape in SHAPES]
    ours = [torch.nn.Parameter(matrix.detach().clone()) for matrix in theirs]
    start = [matrix.detach().clone() for matrix in theirs]
    optimisers = [torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1), muon.Muon(ours, 0.1, 0.1, newton_schulz_steps=5)]
    for _ in range(4):
        for one, other in zip(theirs, ours, strict=True):
            one.grad = torch.randn(one.shape, generator=draws)
            other.grad = one.grad.clone()
        for optimiser in optimisers:
            optimiser.step()
    for one, other, before in zip(theirs, ours, start, strict=True):
        assert (one - other).norm() <= 0.01 * (one - before).norm()


def test_singular_vectors_stay_and_singular_values_come_near_one(draws):
    left = torch.linalg.qr(torch.randn(3, 32, 32, generator=draws)).Q
    right = torch.linalg.qr(torch.randn(3, 48, 32, generator=draws)).Q
    values = torch.logspace(0, -1.5, 32)
    flat = left.mT @ muon.orthogonal(left @ torch.diag(values) @ right.mT, steps=5) @ right
    found = flat.diagonal(dim1=1, dim2=2)
    assert 0.6 <= found.min() and found.max() <= 1.3
    assert (flat - torch.diag_embed(found)).abs().max() <= 1e-3


def test_a_matrix_of_one_row_that_counts_or_of_nothing_stays_finite(draws):
    one = torch.outer(torch.randn(64, generator=draws), torch.randn(128, generator=draws))
    found = muon.orthogonal(torch.stack([one, torch.zeros(64, 128)]), steps=5)
    assert 0.6 <= torch.linalg.matrix_norm(found[0], 2) <= 1.3
    assert not found[1].any()
