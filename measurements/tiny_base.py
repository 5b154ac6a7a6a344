"""The tiny world's base with other numbers: seconds to make it, and how far it has learnt what it learns last.

    python measurements/tiny_base.py 1 2 3                              # seeds, with the config's numbers
    python measurements/tiny_base.py 1 train.steps=700 documents.n=9000  # keys below base.scratch

For each seed: processor seconds to make it, the mean probability of a demanded keyword where the answer has it (near 1: the
base copies words out of its prompt, which it learns last), and nats of an answer that follows, by instruction kind.
"""

import random
import sys
import time
from collections import defaultdict
from typing import Any

import torch
import yaml

from workflow_scripts.config import config as configs
from workflow_scripts.models import device
from workflow_scripts.tiny import pretrain, world
from workflow_scripts.tiny.answers import following_answer

PROMPTS = 900


def main(arguments: list[str]) -> None:
    numbers = configs.load("config/config.yaml").data["base"]["scratch"]
    for change in (argument for argument in arguments if "=" in argument):
        path, value = change.split("=")
        *above, last = path.split(".")
        place = numbers
        for key in above:
            place = place[key]
        place[last] = yaml.safe_load(value)
    for seed in (int(argument) for argument in arguments if "=" not in argument):
        device.prepare({"threads": 1, "seed": seed, "device": "cpu", "precision": "fp32"})
        start = time.process_time()
        model, tokenizer = pretrain.build(numbers, seed)
        seconds = time.process_time() - start
        copied, nats = probed(model, tokenizer)
        kinds = ", ".join(f"{kind} {value:.1f}" for kind, value in sorted(nats.items()))
        print(f"seed {seed}: {seconds:.0f} s; keyword {copied:.3f}; {kinds}", flush=True)


@torch.no_grad()
def probed(model: Any, tokenizer: Any) -> tuple[float, dict[str, float]]:
    """(mean probability of the keyword, kind -> mean nats of an answer) over prompts with one instruction."""
    rng = random.Random(5)
    copied: list[float] = []
    nats: dict[str, list[float]] = defaultdict(list)
    start = tokenizer.convert_tokens_to_ids(pretrain.START)
    while sum(len(found) for found in nats.values()) < PROMPTS:
        task = world.draw_task(rng)
        if len(task.instructions) > 1:
            continue
        answer = following_answer(rng, task.topic, task.instructions)
        talk = [{"role": "user", "content": task.prompt}, {"role": "assistant", "content": answer}]
        row = tokenizer(tokenizer.apply_chat_template(talk, tokenize=False), add_special_tokens=False)["input_ids"]
        losses = torch.nn.functional.cross_entropy(
            model(input_ids=torch.tensor([row])).logits[0, :-1], torch.tensor(row[1:]), reduction="none"
        )
        turn = [at for at, token in enumerate(row) if token == start][1]
        nats[task.instructions[0].kind].append(losses[turn:].sum().item())
        if task.instructions[0].kind == "keyword":
            word = tokenizer.encode(f" {task.instructions[0].kwargs['keywords'][0]}", add_special_tokens=False)
            places = [at for at in range(turn, len(row)) if row[at : at + len(word)] == word]
            copied += [losses[places[0] - 1].neg().exp().item()] if places else []
    return sum(copied) / len(copied), {kind: sum(found) / len(found) for kind, found in nats.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
