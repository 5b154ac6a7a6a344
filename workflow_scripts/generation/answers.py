"""What a generator is asked, and what it answers."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

ROWS, PREFILL = 384, 1024  # of a step on a GPU: rows that decode, and rows that fill slots (generation/graphs.py)
FEW = 64  # rows of a rollout's step come in multiples of it


def rows_for(answers: int) -> int:
    """Rows of a step on a GPU where there are never more answers at once, as in a rollout; at most ROWS.

    On an H200 a sampled step of 0.5 B takes 1.8 to 1.9 ms with 64 rows, 2.6 with 384 (docs/generation.md). How many there are
    decides how products round, so they follow from what decides the training, not from slots.
    """
    return min(ROWS, -(-answers // FEW) * FEW)


@dataclass(frozen=True)
class Asked:
    """How to answer. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 leave all tokens in.

    A row's random stream is its own: its draws are functions of `seed`, the prompt's place, the sample's number and how many
    tokens it has so far, whatever else is answered beside it.
    """

    ends: tuple[int, ...]  # any of these tokens ends an answer, of which it is a part
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    samples: int = 1  # answers to each prompt
    logprobs: bool = False

    def streams(self, prompt: int, sample: int) -> tuple[int, int]:
        """Two numbers below 2**32 that a row's draws are made from."""
        text = f"{self.seed} {prompt} {sample}".encode()
        digest = hashlib.blake2s(text, digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


@dataclass
class Answer:
    """tokens: with the end of turn, if there is one. logprobs: of each token under the distribution at `temperature`, before
    top-k and top-p; where asked."""

    tokens: list[int]
    stopped: bool  # at an end; else by the length
    logprobs: list[float] | None = None


Done = Callable[[int, int, Answer], None]  # (the prompt's place, the sample's number, the answer), as soon as there is one
