"""The backend `vllm`: another project's server (Kwon et al. 2023, arXiv:2309.06180), for models that `graphs` does not know.

It answers evaluations alone. Written against the Python API of vLLM 0.26.0 as its wheel has it, whose names and arguments are
recorded in tests/files/vllm_api.json. It is in no lock that `make setup` installs: its own torch is another one, so that jobs
that answer with it run in an environment of their own (envs/vllm.yaml), whose versions (envs/vllm.lock) stand in their step.

What is asked of it: token ids in and out, no tokenizer; `temperature: 0` and no penalty where answers are greedy; no setting of
the model's folder (`generation_config="vllm"`); the ends that the model declares and no other (`ignore_eos` with
`stop_token_ids`: the end stays a part of the answer). The adapter stands beside the base's weights, rounded to their precision,
as vLLM's own LoRA has it. One process, no telemetry, no plugins, nothing from a network.

vLLM answers a chunk at a time, whose answers are there when its last one is. What is answered together rounds differently in
bf16, so the chunk is part of an evaluation's fingerprint, a killed evaluation answers the chunk again that it was at, and a row's
seed makes its draws its own only up to that rounding. They are not the draws of the other backends.
"""

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from workflow_scripts.generation.answers import Answer, Asked, Done
from workflow_scripts.generation.hf import batches
from workflow_scripts.plumbing import gpus
from workflow_scripts.plumbing.messages import InputError

PACKAGE = "vllm"  # by name: what is imported here would have to be in the lock of what runs
AT_ONCE = 256  # answers that it decodes together: 512 were no faster on an H200 (docs/generation.md)
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM 0.26 makes room for (vllm/config/lora.py)
COOLEST = 0.01  # a temperature below this one it would raise to it
SHARE = 0.9  # of the memory that the job has: CUDA graphs are captured beside what vLLM counts
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: it keeps to its memory, and ends with it
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_PLUGINS": "",
    "HF_HUB_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it would compile with nvcc; and it knows no seed of a row
    "VLLM_LOGGING_LEVEL": "WARNING",
}
# An adapter's share on vLLM's path of what it does on peft's, outside which an evaluation stops. Wide, since both round.
LEAST, MOST = 0.5, 2.0


class Engine:
    """An engine for one base, with one adapter or none.

    model, adapter: folders; rank: of the adapter; dtype: vLLM's name of the precision; length: tokens of the longest prompt with
    its answer; size: prompts in a chunk.
    """

    def __init__(self, model: Path, adapter: Path | None, rank: int, dtype: str, length: int, size: int):
        self.size = size
        os.environ.update(ENVIRONMENT)  # before the import, which reads them
        vllm = import_module(PACKAGE)
        self.sampling, self.prompt, self.lora = vllm.SamplingParams, vllm.TokensPrompt, None
        beside = {}
        if adapter is not None:
            request = import_module(f"{PACKAGE}.lora.request").LoRARequest
            self.lora = request(lora_name="adapter", lora_int_id=1, lora_path=str(adapter))
            beside = {"enable_lora": True, "max_loras": 1, "max_lora_rank": room_for(rank, adapter)}
        self.llm = vllm.LLM(
            model=str(model),
            skip_tokenizer_init=True,
            trust_remote_code=False,
            dtype=dtype,
            load_format="safetensors",
            generation_config="vllm",
            logprobs_mode="processed_logprobs",  # at the temperature that is drawn at
            max_model_len=length,
            max_num_seqs=min(AT_ONCE, size),
            gpu_memory_utilization=share_of_card(),
            enforce_eager=False,
            tensor_parallel_size=1,
            seed=0,
            disable_log_stats=True,
            **beside,
        )

    def answer(self, groups: list[list[tuple[int, list[int]]]], asked: Asked, done: Done) -> None:
        for rows in batches(groups, asked.samples):
            how = [self._how(asked, place, sample) for place, sample, _ in rows]
            for (place, sample, _), made in zip(rows, self._ask([ids for *_, ids in rows], how), strict=True):
                done(place, sample, read(made.outputs[0], asked))

    def likely(self, texts: list[list[int]], beside: bool) -> list[float]:
        """The log-probability of each token but the first of each text, with the adapter beside the weights or without it."""
        how = self.sampling(temperature=0.0, max_tokens=1, prompt_logprobs=0, ignore_eos=True, detokenize=False)
        found = self._ask(texts, [how] * len(texts), beside)
        return [
            place[token].logprob
            for ids, one in zip(texts, found, strict=True)
            for token, place in zip(ids[1:], one.prompt_logprobs[1:], strict=True)
        ]

    def _ask(self, texts: list[list[int]], how: list[Any], beside: bool = True) -> Any:
        prompts = [self.prompt(prompt_token_ids=ids) for ids in texts]
        return self.llm.generate(prompts, how, use_tqdm=False, lora_request=self.lora if beside else None)

    def _how(self, asked: Asked, place: int, sample: int) -> Any:
        if 0 < asked.temperature < COOLEST:
            raise InputError(f"temperature: found {asked.temperature}; vLLM draws at {COOLEST} or more; set 0 for greedy answers")
        assert not (asked.logprobs and (asked.top_k or asked.top_p < 1)), "vLLM has them after top-k and top-p alone"
        first, second = asked.streams(place, sample)
        return self.sampling(
            n=1,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            min_p=0.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            repetition_penalty=1.0,
            seed=(first << 31) | (second >> 1) if asked.temperature else None,  # 63 bits
            stop_token_ids=list(asked.ends),
            ignore_eos=True,
            max_tokens=asked.max_new_tokens,
            logprobs=0 if asked.logprobs else None,  # of the token itself
            detokenize=False,
        )


def read(made: Any, asked: Asked) -> Answer:
    """A `CompletionOutput` as an answer."""
    tokens = list(made.token_ids)
    stopped = bool(tokens) and tokens[-1] in asked.ends
    if made.finish_reason not in ("stop", "length") or stopped != (made.finish_reason == "stop"):
        raise RuntimeError(f"vLLM ended an answer by {made.finish_reason!r}, whose last tokens are {tokens[-3:]}")
    likely = [at[token].logprob for token, at in zip(tokens, made.logprobs, strict=True)] if asked.logprobs else None
    return Answer(tokens, stopped, likely)


def room_for(rank: int, adapter: Path) -> int:
    """The smallest rank of those that vLLM makes room for."""
    if rank > RANKS[-1]:
        raise InputError(f"{adapter}: rank {rank}; vLLM takes {RANKS[-1]} at most; set generation.backend: graphs")
    return next(one for one in RANKS if one >= rank)


def share_of_card() -> float:
    """The share of the card that vLLM may fill: of what the ledger granted to the job, or of what is free on one of its own."""
    free, whole = torch.cuda.mem_get_info()
    return round(SHARE * min(free, gpus.limit() or free) / whole, 4)


def agreement(vllm: Sequence[float], peft: Sequence[float]) -> dict[str, float]:
    """How much of what an adapter does on peft's path it does on vLLM's. Both: by how much it changes the log-probability of each
    of the same tokens.

    share: the slope of a line through the origin, 1 where both are one; `se`: its standard error, by what is left. InputError
    where the share is surely outside LEAST to MOST. Without a change on peft's path there is nothing to compare: {}.
    """
    square = sum(y * y for y in peft)
    if not square:
        return {}
    share = sum(x * y for x, y in zip(vllm, peft, strict=True)) / square
    left = sum((x - share * y) ** 2 for x, y in zip(vllm, peft, strict=True))
    se = (left / max(1, len(peft) - 1) / square) ** 0.5
    if share + 3 * se < LEAST or share - 3 * se > MOST:
        raise InputError(
            f"vllm: the adapter does {share:.0%} of what it does in peft (standard error {se:.0%}) to the log-probabilities of "
            "held-out tokens, so what would be evaluated is not what was trained; set generation.backend: graphs"
        )
    return {"share": float(f"{share:.4g}"), "se": float(f"{se:.2g}")}
