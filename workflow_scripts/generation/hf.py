"""The backend `hf`: transformers' own `generate`, group by group, padded on the left."""

from typing import Any

import torch

from workflow_scripts.generation.answers import Answer, Asked, Done


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, groups: list[list[tuple[int, list[int]]]], asked: Asked, done: Done) -> None:
    """groups: what is answered together, each of (a prompt's place, its token ids). Greedy alone: draws would be torch's, which
    depend on what else is in the group. What the model's generation config says of penalties acts."""
    assert asked.temperature == 0 and asked.samples == 1 and not asked.logprobs
    tokenizer.padding_side = "left"
    for group in groups:
        batch = tokenizer.pad({"input_ids": [ids for _, ids in group]}, return_tensors="pt")
        generated = model.generate(
            **{name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")},
            do_sample=False,
            num_beams=1,
            max_new_tokens=asked.max_new_tokens,
            eos_token_id=list(asked.ends),
            pad_token_id=tokenizer.pad_token_id,
            tokenizer=tokenizer,  # for the texts at which a folder may want to stop
        )
        for (place, _), tokens in zip(group, generated[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            length = next((n for n, token in enumerate(tokens, start=1) if token in asked.ends), None)
            done(place, 0, Answer(tokens[:length], length is not None))
