"""The part `prefix` of measurements/generation.py: prompts that begin alike, what they share computed once or not."""

import random
from collections.abc import Callable
from typing import Any

import torch

from workflow_scripts.generation import prefixes


def work(vocabulary: int, small: bool) -> tuple[list[list[int]], list[int]]:
    """As GSM8K with eight examples: 1,319 prompts of about 1,800 tokens, of which 1,650 are the same; answers of 40 to 256.

    small: for a CPU, 8 prompts of 860 tokens, of which 800 are the same, and answers of 16."""
    draw = random.Random(5)
    count, shared, least, most = (8, 800, 40, 80) if small else (1319, 1650, 60, 240)
    examples = [draw.randrange(3, vocabulary) for _ in range(shared)]
    prompts = [examples + [draw.randrange(3, vocabulary) for _ in range(draw.randint(least, most))] for _ in range(count)]
    return prompts, [16 if small else 40 + round(216 * draw.betavariate(1.5, 2)) for _ in range(count)]


def prefix(graphs: Callable[..., dict], model: Any, work: tuple[list[list[int]], list[int]], runs: int) -> dict:
    """The same prompts with what they have in common computed once, and without; how many answers are the same.

    graphs: that of measurements/generation.py."""
    found: dict[str, Any] = {}
    answers: dict[str, dict[int, list[int]]] = {"shared": {}, "not shared": {}}
    right = prefixes.beginnings
    for name, kept in answers.items():
        torch._dynamo.reset()
        prefixes.beginnings = right if name == "shared" else lambda ids: []
        try:
            found[name] = graphs(model, work, runs, kept=kept)
        finally:
            prefixes.beginnings = right
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    same = sum(one == answers["not shared"][place] for place, one in answers["shared"].items())
    return found | {"prompts": len(work[0]), "equal_answers": same}
