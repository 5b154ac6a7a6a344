"""The next token of each row: the most likely one, or one drawn from the row's own stream.

A draw is the largest of score + g over the vocabulary, with g independent Gumbel noise: its distribution is the softmax of the
scores (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030). The noise of a token is a hash of the row's two stream numbers, of
how many tokens the row has, and of the token's id, so that a draw depends on nothing else. The hash is the 32-bit finaliser
"lowbias32" (Wellons 2018, github.com/skeeto/hash-prospector), applied once for each number.
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def mixed(x: Tensor) -> Tensor:
    """lowbias32 of int64 numbers; only their low 32 bits count."""
    x = x & MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK  # beyond 63 bits it wraps, which leaves the low 32 right
    return x ^ (x >> 16)


def noise(first: Tensor, second: Tensor, count: Tensor, size: int) -> Tensor:
    """(rows, size) Gumbel noise, fp32. first, second, count: (rows,) int64."""
    row = mixed(first ^ mixed(second ^ mixed(count)))
    token = mixed(torch.arange(size, device=first.device) + 1)
    hashed = mixed(mixed(row[:, None] ^ token[None]) + row[:, None])
    uniform = (hashed.float() + 0.5) * 2.0**-32  # fine near 0, where the largest noise comes from
    return -torch.log(-torch.log1p(-uniform))


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, streams: tuple[Tensor, Tensor], count: Tensor,
           logprobs: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(token, its log-probability at `temperature` or None), both (rows,), from logits (rows, vocabulary)."""
    scores = logits.float()
    if temperature > 0:
        scores = scores / temperature
        allowed = _allowed(scores, top_k, top_p)
        token = (allowed + noise(*streams, count, scores.shape[1])).argmax(-1)
    else:
        token = scores.argmax(-1)
    if not logprobs:
        return token, None
    return token, scores.gather(1, token[:, None])[:, 0] - scores.logsumexp(-1)


def _allowed(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Scores with -inf for tokens outside the `top_k` most likely, or outside the fewest that have `top_p` of what is left."""
    if 0 < top_k < scores.shape[1]:
        least = scores.topk(top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if top_p < 1:
        ordered = scores.sort(-1, descending=True).values
        share = ordered.softmax(-1)
        inside = share.cumsum(-1) - share < top_p  # what comes before a token has less than top_p: it is in
        least = ordered.masked_fill(~inside, torch.inf).amin(-1, keepdim=True)
        scores = scores.masked_fill(scores < least, -torch.inf)
    return scores
