"""Score conversations with a reward model, and say how well it tells the better answer from the worse one."""

from pathlib import Path
from typing import Any

from workflow_scripts.artifacts.manifests import Artifact
from workflow_scripts.models import loading, lora
from workflow_scripts.plumbing.progress import Progress


def load(start: Artifact, adapter: Artifact, work: Path, device: str, precision: str, quant: dict | None) -> tuple[Any, Any]:
    """(reward model, tokenizer): the adapter with its head on the model that it was trained on, ready to score."""
    from workflow_scripts.models.chat import tokenizer_of

    model = loading.load(start, work, device, precision, quant, reward=True)
    return lora.attach(model, start, adapter).eval(), tokenizer_of(start)


def lengths(tokenizer: Any, pair: dict) -> tuple[int, int]:
    """Tokens of the whole conversation with the chosen answer and with the rejected one."""
    chosen, rejected = (
        tokenizer.apply_chat_template(pair["prompt"] + pair[side])["input_ids"] for side in ("chosen", "rejected")
    )
    return len(chosen), len(rejected)


def score(model: Any, tokenizer: Any, conversations: list[list[dict]], batch_size: int, max_length: int) -> list[float]:
    """The reward of each conversation (turns with role and content, an answer last), in their order.

    Rendered by the chat template as in training, so that the reward is read at the same place: the last token. From the longest
    to the shortest, padded on the right. One longer than `max_length` tokens loses its beginning: rewards are read at the end.
    The head computes in fp32, whatever the backbone does.
    """
    import torch

    encoded = [tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"][-max_length:] for turns in conversations]
    order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i]), i))
    head = next(module for name, module in model.named_modules() if name.endswith(lora.HEAD))
    hook = head.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    device = next(model.parameters()).device
    scores = [0.0] * len(encoded)
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            width = len(encoded[rows[0]])
            ids = torch.full((len(rows), width), tokenizer.pad_token_id)
            mask = torch.zeros((len(rows), width), dtype=torch.long)
            for place, i in enumerate(rows):
                ids[place, : len(encoded[i])] = torch.tensor(encoded[i])
                mask[place, : len(encoded[i])] = 1
            with torch.no_grad():  # not inference_mode: weights that ranks share out are gathered in it, for training too
                logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
            for i, value in zip(rows, logits[:, 0].float().tolist(), strict=True):
                scores[i] = value
    finally:
        hook.remove()
        model.train(was_training)
    return scores


def score_pairs(
    model: Any, tokenizer: Any, pairs: list[dict], batch_size: int, max_length: int, label: str = ""
) -> tuple[list[float], list[float]]:
    """(rewards of the chosen answers, rewards of the rejected ones) of rows of kind preference."""
    bar = Progress(len(pairs), label) if label else None
    chosen: list[float] = []
    rejected: list[float] = []
    for first in range(0, len(pairs), batch_size):
        rows = pairs[first : first + batch_size]
        talks = [row["prompt"] + row[side] for side in ("chosen", "rejected") for row in rows]
        scores = score(model, tokenizer, talks, batch_size, max_length)
        chosen += scores[: len(rows)]
        rejected += scores[len(rows) :]
        if bar:
            bar.step(first + len(rows))
    if bar:
        bar.close()
    return chosen, rejected


def by_pair(chosen: list[float], rejected: list[float]) -> dict[str, list[float]]:
    """Of each pair the Bradley-Terry loss, whether it is in the right order (a tie is wrong), and the margin."""
    import numpy

    margins = numpy.asarray(chosen) - numpy.asarray(rejected)
    found = {"loss": numpy.logaddexp(0, -margins), "accuracy": (margins > 0).astype(float), "margin": margins}
    return {name: values.tolist() for name, values in found.items()}


def objective(chosen: list[float], rejected: list[float]) -> dict[str, float]:
    """The means of `by_pair`, and `n` pairs."""
    import numpy

    means = {name: round(float(numpy.mean(values)), 6) for name, values in by_pair(chosen, rejected).items()}
    return {**means, "n": len(chosen)}
