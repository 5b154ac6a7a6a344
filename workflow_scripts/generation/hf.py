"""The backend `hf`: transformers' own `generate`, group by group, padded on the left.

Where answers are drawn, `generate` is greedy all the same, over scores that leave one token: the one that the generator would
draw there, from the answer's own stream (draws.py). A draw then depends on its neighbours as a greedy answer does, by rounding.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from workflow_scripts.generation.answers import Answer, Asked, Done
from workflow_scripts.generation.draws import choose


class Drawn(LogitsProcessor):
    """Leaves each row the token that its stream draws. rows: (place, sample) of each."""

    def __init__(self, asked: Asked, rows: list[tuple[int, int]], prompt: int, device: Any):
        self.asked, self.prompt = asked, prompt
        streams = torch.tensor([asked.streams(*row) for row in rows], device=device)
        self.first, self.second = streams.T

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        said = torch.full_like(self.first, input_ids.shape[1] - self.prompt)
        asked = self.asked
        token, _ = choose(scores, asked.temperature, asked.top_k, asked.top_p, (self.first, self.second), said, False)
        return torch.full_like(scores, float("-inf")).scatter_(1, token[:, None], 0.0)


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, groups: list[list[tuple[int, list[int]]]], asked: Asked, done: Done) -> None:
    """groups: what is answered together, each of (a prompt's place, its token ids), so often as `asked.samples` says. What the
    model's generation config says of penalties acts."""
    assert not asked.logprobs
    tokenizer.padding_side = "left"
    for group, sample in [(group, sample) for group in groups for sample in range(asked.samples)]:
        batch = tokenizer.pad({"input_ids": [ids for _, ids in group]}, return_tensors="pt")
        width = batch["input_ids"].shape[1]
        rows = [(place, sample) for place, _ in group]
        drawn = [Drawn(asked, rows, width, model.device)] if asked.temperature else []
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
        for (place, _), tokens in zip(group, generated[:, width:].tolist(), strict=True):
            length = next((n for n, token in enumerate(tokens, start=1) if token in asked.ends), None)
            done(place, sample, Answer(tokens[:length], length is not None))
