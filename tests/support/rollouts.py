"""Sampled answers and a reward for them that is known, to work out by hand what a method of rollouts makes of them."""

import torch

from workflow_scripts.artifacts import manifests
from workflow_scripts.models import loading


def fixed_reward(prompts, completions, completion_ids, **columns):
    """0 to 6 by the sum of the answer's ids. Each group of the first prompt of a batch: 1 for all."""
    first = prompts[0][0]["content"]
    return [
        1.0 if prompt[0]["content"] == first else float(sum(ids) % 7) for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


def plain(base, place=None):
    """The base, or the adapter saved at `place` on it, without the trainer."""
    from peft import PeftModel

    model = loading.load(manifests.read(base), base.parent, "cpu", "fp32")
    return (model if place is None else PeftModel.from_pretrained(model, place, is_trainable=True)).eval()


def answers_of(rollout):
    """(ids of the prompt, ids of the answer) of each row, without padding."""
    return [
        tuple(rollout[f"{part}_ids"][i][rollout[f"{part}_mask"][i].bool()].tolist() for part in ("prompt", "completion"))
        for i in range(len(rollout["prompt_ids"]))
    ]


def log_probs(model, prompt, answer):
    """log p of each token of an answer, (T,), with its gradient."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1)[range(len(answer)), answer]
