"""Sampling: draws come from the distribution that is asked for, and from the row's own stream alone."""

import pytest
import torch
from scipy.stats import chisquare

from workflow_scripts.generation import draws, graphs
from workflow_scripts.generation.answers import Asked

SCORES = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, -3.0])


def drawn(rows: int, **how) -> tuple[torch.Tensor, torch.Tensor]:
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | how
    asked = Asked((0,), 1, seed=5)
    streams = torch.tensor([asked.streams(row, 0) for row in range(rows)]).T
    token, logprob = draws.choose(
        SCORES.repeat(rows, 1), settings["temperature"], settings["top_k"], settings["top_p"], tuple(streams),
        torch.zeros(rows, dtype=torch.long), True,
    )  # fmt: skip
    return token, logprob


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_frequencies_are_those_of_the_softmax(temperature):
    token, logprob = drawn(20_000, temperature=temperature)
    wanted = (SCORES / temperature).softmax(0)
    assert (
        chisquare(torch.bincount(token, minlength=8).numpy(), (20_000 * wanted.double() / wanted.double().sum()).numpy()).pvalue
        > 1e-3
    )
    torch.testing.assert_close(logprob, wanted.log()[token])


def test_draws_of_one_row_are_independent_of_each_other_and_of_another_rows():
    first, second = Asked((0,), 1, seed=5).streams(0, 0), Asked((0,), 1, seed=5).streams(0, 1)
    count = torch.arange(20_000)
    made = []
    for streams in (first, second):
        pair = tuple(torch.full((20_000,), one) for one in streams)
        made.append(draws.choose(SCORES.repeat(20_000, 1), 1.0, 0, 1.0, pair, count, False)[0])
    share = SCORES.softmax(0)
    for a, b in ((made[0][:-1], made[0][1:]), (made[0], made[1])):
        same = (a == b).double().mean().item()
        assert same == pytest.approx((share**2).sum().item(), abs=0.015)


def test_the_noise_is_gumbels():
    noise = draws.noise(torch.tensor([1]), torch.tensor([2]), torch.tensor([3]), 200_000)[0].double()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01) and noise.var().item() == pytest.approx(1.6449, abs=0.03)
    assert torch.isfinite(noise).all()


def test_top_k_and_top_p_leave_out_what_transformers_leaves_out():
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    scores = torch.randn(50, 40) * 3
    for top_k, top_p in ((5, 1.0), (0, 0.8), (12, 0.6), (1, 1.0)):
        wanted = scores
        if top_k:
            wanted = TopKLogitsWarper(top_k)(None, wanted)
        if top_p < 1:
            wanted = TopPLogitsWarper(top_p)(None, wanted)
        assert torch.equal(draws._allowed(scores, top_k, top_p), wanted)


def test_a_draw_that_rows_share_is_seen(monkeypatch):
    """The planted fault: one stream for all rows."""
    right = drawn(500)[0]
    monkeypatch.setattr(Asked, "streams", lambda self, prompt, sample: (1, 2))
    shared = drawn(500)[0]
    assert len(right.unique()) > 3 and len(shared.unique()) == 1


def test_the_log_probabilities_are_the_models_own():
    from tests.generation.conftest import ENDS, model_of

    model, found = model_of("Qwen2", True), {}
    prompt = [5, 6, 10, 11]
    asked = Asked(ENDS, 20, temperature=0.7, seed=1, samples=3, logprobs=True)
    graphs.Graphs(model, 4, 64).answer([(0, prompt)], asked, lambda _, sample, made: found.__setitem__(sample, made))
    assert len({tuple(made.tokens) for made in found.values()}) == 3
    for made in found.values():
        with torch.no_grad():
            logits = model(torch.tensor([prompt + made.tokens])).logits[0, len(prompt) - 1 : -1] / 0.7
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(made.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(made.logprobs), wanted, atol=1e-4, rtol=1e-4)
