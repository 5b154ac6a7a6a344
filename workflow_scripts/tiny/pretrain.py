"""Make the tiny world's base model from nothing: tokenizer, Qwen2-shaped model, pretraining.

The optimiser is Muon (muon.py) for the matrices inside the blocks and AdamW for embeddings, norms and biases: within a
two-minute budget, AdamW alone does not get this model to read its instructions. The numbers that one
would tune come from the config; nothing here has a default. With the same config, seed and thread count, two runs on
one machine give the same bytes.

The loss is on the answers alone. The prompts' topics and instructions are drawn at random, so learning to predict them
teaches nothing and costs what matters: with a loss on every token, the same 1,600 steps copied a demanded keyword into
8 % of the answers, with this one into all.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tiny import muon, world

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = Path(__file__).with_name("chat_template.jinja")
POOL = 16  # batches that are cut from one pool of documents sorted by length: little padding, still shuffled


def build(
    cfg: dict[str, Any], seed: int, progress: Callable[[int, int, float], None] | None = None
) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """Pretrain the base model of the tiny world.

    cfg: the mapping under the config's `base:` with `documents`, `tokenizer`, `model` and `train`. seed: of the
    documents, the initial weights and the order of the rows. progress(step, total, loss): called after each step, loss
    in nats per token. Returns the model (fp32, evaluation mode, on the CPU) and its tokenizer with the chat template.
    """
    train = cfg["train"]
    documents = world.documents(seed=seed, **cfg["documents"])
    tokenizer = build_tokenizer(cfg, documents)
    model = _model(cfg, tokenizer, seed)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    optimisers: list[torch.optim.Optimizer] = [
        muon.Muon(matrices, train["muon_learning_rate"], train["weight_decay"], train["newton_schulz_steps"]),
        torch.optim.AdamW(others, lr=train["adamw_learning_rate"], betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in documents]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    longest = max(map(len, rows))
    if longest > train["max_length"]:
        raise InputError(
            f"base.scratch.train.max_length: found {train['max_length']}, but a document has {longest} tokens; "
            f"raise it to {longest}"
        )

    steps, start = train["steps"], tokenizer.convert_tokens_to_ids(START)
    assert isinstance(start, int)
    batches = _batches(rows, train["batch"], steps, random.Random(seed))
    model.train()
    for step, batch in enumerate(batches, start=1):
        for optimiser, peak in zip(optimisers, peaks, strict=True):
            optimiser.param_groups[0]["lr"] = peak * _schedule(step, steps, train["warmup_steps"], train["decay_share"])
        ids, learnt = _pad(batch, tokenizer.pad_token_id, start)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # causal: right padding needs no mask
        loss = cross_entropy(model.lm_head(hidden[:, :-1][learnt[:, 1:]]), ids[:, 1:][learnt[:, 1:]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train["max_grad_norm"])
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        value = loss.item()
        if value != value:
            raise InputError(f"base.scratch.train: found a loss that is not a number at step {step}; lower the learning rates")
        if progress is not None:
            progress(step, steps, value)
    return model.eval(), tokenizer


def build_tokenizer(cfg: dict[str, Any], documents: Sequence[dict]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with single digits on `documents` ({"messages": ...}); lossless on any text.

    Digits are split so that sums and word counts are read digit by digit. A space belongs to the word behind it, and
    numbers have their space as a token of its own.
    """
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?[A-Za-z]+|[^A-Za-z\d]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=cfg["tokenizer"]["vocab_size"],
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # The roles stand in the template, so they are part of the text that the model reads.
    messages = [message for row in documents for message in row["messages"]]
    inner.train_from_iterator((part for message in messages for part in (message["role"], message["content"])), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=cfg["model"]["max_position_embeddings"],
    )
    tokenizer.chat_template = TEMPLATE.read_text()
    return tokenizer


def _model(cfg: dict[str, Any], tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        **cfg["model"],
    )
    model = Qwen2ForCausalLM(config).float()
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=eos, pad_token_id=pad)
    return model


def _schedule(step: int, steps: int, warmup: int, decay_share: float) -> float:
    """Factor on the peak learning rate at `step` (from 1): linear warm-up, constant, linear decay at the end."""
    return min(1.0, step / max(warmup, 1), (steps - step + 1) / max(decay_share * steps, 1))


def _batches(rows: list[list[int]], size: int, steps: int, rng: random.Random) -> list[list[list[int]]]:
    """`steps` batches of `size` rows of similar length, drawn epoch by epoch without replacement."""
    batches: list[list[list[int]]] = []
    while len(batches) < steps:
        order = rng.sample(rows, len(rows))
        epoch = []
        for start in range(0, len(order), size * POOL):
            pool = sorted(order[start : start + size * POOL], key=len)
            epoch += [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
        rng.shuffle(epoch)
        batches += epoch
    return batches[:steps]


def _pad(batch: list[list[int]], pad: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, T), padded on the right, and a mask (B, T) of the tokens to learn: those of the second turn."""
    width = max(map(len, batch))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in batch])
    return ids, ((ids == start).cumsum(1) == 2) & (ids != pad)
