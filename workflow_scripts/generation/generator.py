"""Which backend answers: `graphs` where it can, else transformers' `generate`, with a line in the log that says why."""

from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from workflow_scripts.generation import decoder, hf
from workflow_scripts.generation.answers import Asked, Done
from workflow_scripts.generation.graphs import Graphs

FALLBACK = 32  # prompts at a time, where `hf` answers in place of `graphs`
Prompts = list[tuple[int, list[int]]]  # each one's place, and its token ids


class Generator(Protocol):
    """size: how many prompts one of the groups has that `answer` takes, where what is answered together could matter; else 1."""

    size: int

    def answer(self, groups: list[Prompts], asked: Asked, done: Done) -> None: ...


class InSlots:
    """The backend `graphs`."""

    size = 1

    def __init__(self, model: Any, slots: int, length: int, exact: bool):
        self.engine = Graphs(model, slots, length, exact=exact)

    def answer(self, groups: list[Prompts], asked: Asked, done: Done) -> None:
        self.engine.answer([prompt for group in groups for prompt in group], asked, done)

    def logits(self, ids: list[int], strength: float) -> Tensor:
        return self.engine.logits(ids, strength)

    def updates(self) -> Any:
        return self.engine.decoder.updates()


class InBatches:
    """The backend `hf`."""

    def __init__(self, model: Any, tokenizer: Any, size: int):
        self.model, self.tokenizer, self.size = model, tokenizer, size

    def answer(self, groups: list[Prompts], asked: Asked, done: Done) -> None:
        hf.answer(self.model, self.tokenizer, groups, asked, done)


def hinders(model: Any) -> str | None:
    """Why `graphs` can't answer for a model where it is, or None."""
    device = next(model.parameters()).device
    if device.type == "cuda" and not find_spec("triton"):
        return "this torch has no Triton, which its attention is written in"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return "this card is older than Triton compiles for"
    reason = decoder.unsupported(model)
    size = 0 if reason else model.model.layers[0].self_attn.head_dim
    if device.type == "cuda" and size & (size - 1):
        return f"its heads have a size of {size}, which is no power of two"
    return reason


def of(model: Any, tokenizer: Any, settings: dict, slots: int, length: int) -> Generator:
    """The generator of a model with its adapter beside it. settings: `backend`, and for `hf` `batch_size`, for `graphs`
    `adapter`; slots: answers at once; length: tokens of the longest prompt with its answer."""
    if settings["backend"] == "hf":
        return InBatches(model, tokenizer, settings["batch_size"])
    if reason := hinders(model):
        print(f"plain `generate`, {FALLBACK} prompts at a time, in place of `graphs`: {reason}", flush=True)
        return InBatches(model, tokenizer, FALLBACK)
    return InSlots(model, slots, length, settings["adapter"] == "fp32")
