"""The backend `hf`: transformers' own `generate`, group by group, padded on the left.

Answers are drawn as by the other backend (generation/draws.py): each row from a stream of its own, by a processor of scores that
leaves one token. transformers' own draws would be torch's, which depend on what else is in the group.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from workflow_scripts.generation.answers import Answer, Asked, Done
from workflow_scripts.generation.draws import choose


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, groups: list[list[tuple[int, list[int]]]], asked: Asked, done: Done) -> None:
    """groups: what is answered together, each of (a prompt's place, its token ids); with several answers to each, so many of them
    at a time. What the model's generation config says of penalties acts."""
    assert not asked.logprobs
    tokenizer.padding_side = "left"
    for rows in batches(groups, asked.samples):
        batch = tokenizer.pad({"input_ids": [ids for *_, ids in rows]}, return_tensors="pt")
        width = batch["input_ids"].shape[1]
        drawn = [Drawn(asked, [(place, sample) for place, sample, _ in rows], width, model.device)] if asked.temperature else []
        generated = model.generate(
            **{name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")},
            logits_processor=LogitsProcessorList(drawn),
            do_sample=False,
            num_beams=1,
            max_new_tokens=asked.max_new_tokens,
            eos_token_id=list(asked.ends),
            pad_token_id=tokenizer.pad_token_id,
            tokenizer=tokenizer,  # for the texts at which a folder may want to stop
        )
        for (place, sample, _), tokens in zip(rows, generated[:, width:].tolist(), strict=True):
            length = next((n for n, token in enumerate(tokens, start=1) if token in asked.ends), None)
            done(place, sample, Answer(tokens[:length], length is not None))


def batches(groups: list[list[tuple[int, list[int]]]], samples: int) -> Iterator[list[tuple[int, int, list[int]]]]:
    """(a prompt's place, the sample's number, the prompt's token ids) of what is answered together."""
    for group in groups:
        rows = [(place, sample, ids) for place, ids in group for sample in range(samples)]
        yield from (rows[first : first + len(group)] for first in range(0, len(rows), len(group)))


class Drawn(LogitsProcessor):
    """Leaves of each row's scores the token that its stream draws."""

    def __init__(self, asked: Asked, rows: list[tuple[int, int]], width: int, device: Any):
        """rows: (a prompt's place, the sample's number); width: tokens of the prompts, padded."""
        self.asked, self.width = asked, width
        self.streams = torch.tensor([asked.streams(place, sample) for place, sample in rows], device=device).T

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        asked, (first, second) = self.asked, self.streams
        said = torch.full_like(first, input_ids.shape[1] - self.width)
        token, _ = choose(scores, asked.temperature, asked.top_k, asked.top_p, (first, second), said, False)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)
