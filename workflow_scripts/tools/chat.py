"""Talk to any run: its full-precision start with the adapter beside it, as it is evaluated; `results/base` is the base model.

    python -m workflow_scripts.tools.chat results/dpo
    python -m workflow_scripts.tools.chat results/dpo --prompt "Name three colours."
    cat questions.txt | python -m workflow_scripts.tools.chat results/sft_v2

Each line of standard input is a message; the conversation goes on until `/new` starts another one or the input ends
(Ctrl-D). Answers go to standard output, all else to standard error. Decoding is greedy, as in the evaluation; with
`--temperature` it samples from the whole distribution (no top-k, no top-p), repeatably by `--seed`.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import runs

NEW = "/new"


def load(folder: Path, device: str, precision: str | None, threads: int) -> tuple[Any, Any]:
    """(model, tokenizer) of a run. precision: of the weights; by default that of the run's own evaluation, on a CPU fp32."""
    import torch
    from transformers.utils import logging

    from workflow_scripts.models import chat, loading

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    run = runs.open_run(folder)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here; leave the option out, or say --device cpu")
    if precision is None:
        evaluated = runs.read_json(folder / runs.PHASES["responses"]) or {}
        precision = evaluated.get("step", {}).get("precision", "fp32") if device == "cuda" else "fp32"
    model, _ = loading.evaluated(run.start, run.adapter, run.work, device, precision)
    return model, chat.tokenizer_of(run.start)


def fit(tokenizer: Any, turns: list[dict], room: int) -> tuple[list[dict], list[int]]:
    """The latest turns that leave the model room, and their tokens. The oldest question and answer go first, a system turn never.

    InputError if the last message alone is too long.
    """
    while True:
        tokens = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        if len(tokens) <= room:
            return turns, tokens
        system = [turn for turn in turns[:1] if turn["role"] == "system"]
        rest = turns[len(system) :]
        if len(rest) < 3:
            raise InputError(f"this message takes {len(tokens)} tokens, and there is room for {max(room, 0)}; shorten it")
        turns = system + rest[2:]


def reply(model: Any, tokenizer: Any, tokens: list[int], new: int, temperature: float, streamer: Any = None) -> str:
    """The model's next turn, as text. temperature 0: greedy."""
    import torch

    from workflow_scripts.models import chat

    ends = chat.ends(tokenizer, model)
    batch = torch.tensor([tokens], device=model.device)
    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.inference_mode():
        made = model.generate(
            input_ids=batch, attention_mask=torch.ones_like(batch), num_beams=1, max_new_tokens=new, eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id, streamer=streamer, **how,
        )  # fmt: skip
    answer = made[0, len(tokens) :].tolist()
    length = next((n for n, token in enumerate(answer) if token in ends), None)
    return tokenizer.decode(answer[:length], skip_special_tokens=True)


def messages(prompt: str | None) -> Iterator[str]:
    """The one message given, or the lines that are typed or piped in."""
    if prompt is not None:
        yield prompt
        return
    typed = sys.stdin.isatty()
    while True:
        if typed:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def talk(model: Any, tokenizer: Any, args: argparse.Namespace) -> None:
    from transformers import TextStreamer

    opening = [{"role": "system", "content": args.system}] if args.system else []
    turns = list(opening)
    context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    for message in messages(args.prompt):
        if message == NEW:
            turns = list(opening)
            continue
        try:
            asked = [*turns, {"role": "user", "content": message}]
            kept, tokens = fit(tokenizer, asked, context - args.max_new_tokens)
        except InputError as error:
            if args.prompt is not None:
                raise
            print(f"({error})", file=sys.stderr)
            continue
        if len(kept) < len(asked):
            print("(the oldest turns no longer fit into the model's context and were dropped)", file=sys.stderr)
        live = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if sys.stdout.isatty() else None
        answer = reply(model, tokenizer, tokens, args.max_new_tokens, args.temperature, live)
        if live is None:
            print(answer, flush=True)
        turns = [*kept, {"role": "assistant", "content": answer}]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run, such as results/dpo or results/base")
    parser.add_argument("--prompt", help="answer this message and stop")
    parser.add_argument("--system", help="a system turn before the conversation")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy; 1: the model's own distribution")
    parser.add_argument("--seed", type=int, default=1, help="of the sampling (default: 1)")
    parser.add_argument("--max-new-tokens", type=int, help="of an answer (default: 512, or half of the model's context)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU where there is one")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default: the run's evaluation's; fp32 on a CPU")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch on a CPU (default: all cores)")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.temperature < 0:
        raise InputError(f"--temperature: found {args.temperature:g}, expected 0 or above")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens: found {args.max_new_tokens}, expected 1 or above")
    runs.open_run(args.run)  # a wrong folder is said before torch is loaded
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load(args.run, args.device, args.precision, args.threads)
    torch.manual_seed(args.seed)
    context = getattr(model.config, "max_position_embeddings", None)
    args.max_new_tokens = args.max_new_tokens or min(512, context // 2 if context else 512)
    if args.prompt is None and sys.stdin.isatty():
        print(f"{args.run}: a message a line, {NEW} for a new conversation, Ctrl-D to end", file=sys.stderr)
    talk(model, tokenizer, args)


if __name__ == "__main__":
    runs.command(main)
