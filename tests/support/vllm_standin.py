"""Stands for vLLM where tests run: its names and arguments, with transformers and peft behind them, one prompt after the other.

It does what vLLM 0.26 does with what it is asked, as far as a mistake of ours would show: its own defaults (temperature 1, 16
tokens), the ends of the model's folder unless `ignore_eos`, no adapter without a request, an end that is a part of the answer.
Its arguments are held against the real ones (tests/generation/test_vllm.py); that the real one computes the same is not.
"""

import inspect
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

__version__ = "0.26.0"
CALLS: list[dict] = []  # of `generate`: how many prompts, with which request
ENGINES: list[dict] = []  # the arguments of each engine
STRENGTH = [1.0]  # at which an adapter acts: 1, or what a fault would make of it


@dataclass
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True


class TokensPrompt(dict):
    def __init__(self, prompt_token_ids: list[int]):
        super().__init__(prompt_token_ids=prompt_token_ids)


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""


@dataclass
class Logprob:
    logprob: float


@dataclass
class CompletionOutput:
    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass
class RequestOutput:
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    request_id: str = field(default="")


class LLM:
    def __init__(
        self, model: str, *, skip_tokenizer_init: bool = False, trust_remote_code: bool = False, dtype: str = "auto",
        load_format: str = "auto", generation_config: str = "auto", logprobs_mode: str = "raw_logprobs", max_model_len: int = 0,
        max_num_seqs: int = 256, gpu_memory_utilization: float = 0.92, enforce_eager: bool = False, tensor_parallel_size: int = 1,
        seed: int = 0, disable_log_stats: bool = False, enable_lora: bool = False, max_loras: int = 1, max_lora_rank: int = 16,
    ):  # fmt: skip
        from transformers import AutoModelForCausalLM

        ENGINES.append({name: value for name, value in locals().items() if name in inspect.signature(LLM).parameters})
        assert skip_tokenizer_init and 0 < gpu_memory_utilization <= 1
        folder = Path(model, "generation_config.json")
        self.folder = json.loads(folder.read_text()) if folder.exists() else {}
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.longest, self.mode, self.rank, self.loaded = max_model_len, logprobs_mode, max_lora_rank * enable_lora, ""

    def generate(self, prompts: Any, sampling_params: Any = None, *, use_tqdm: bool = True, lora_request: Any = None) -> Any:
        CALLS.append({"prompts": len(prompts), "adapter": lora_request and lora_request.lora_path})
        if lora_request is not None and not self.loaded:
            from peft import PeftModel

            assert json.loads(Path(lora_request.lora_path, "adapter_config.json").read_text())["r"] <= self.rank
            self.model, self.loaded = PeftModel.from_pretrained(self.model, lora_request.lora_path).eval(), lora_request.lora_path
            for module in self.model.modules():
                if isinstance(scaling := getattr(module, "scaling", None), dict):  # of a layer with LoRA
                    scaling.update({name: STRENGTH[0] * value for name, value in scaling.items()})
        return [
            self._one(prompt["prompt_token_ids"], how, lora_request is not None)
            for prompt, how in zip(prompts, sampling_params, strict=True)
        ]

    def _one(self, ids: list[int], how: SamplingParams, beside: bool) -> RequestOutput:
        assert len(ids) < self.longest and how.n == 1
        if self.loaded and not beside:
            with self.model.disable_adapter():
                return self._said(ids, how)
        return self._said(ids, how)

    @torch.no_grad()
    def _said(self, ids: list[int], how: SamplingParams) -> RequestOutput:
        ends = set(how.stop_token_ids or [])
        eos = self.folder.get("eos_token_id", [])
        ends |= set() if how.ignore_eos else {eos} if isinstance(eos, int) else set(eos)
        penalty = how.repetition_penalty  # the folder's acts alone where nothing is asked for
        draw = torch.Generator().manual_seed(how.seed) if how.seed is not None else None
        said: list[int] = []
        likely: list[dict[int, Logprob]] = []
        before = None
        if how.prompt_logprobs is not None:
            scores = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            before = [None, *({token: Logprob(scores[place, token].item())} for place, token in enumerate(ids[1:]))]
        reason = "length"
        while len(said) < how.max_tokens and len(ids) + len(said) < self.longest:
            scores = self.model(torch.tensor([ids + said])).logits[0, -1].float()
            for token in set(said):
                scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
            heat = how.temperature if self.mode == "processed_logprobs" and how.temperature else 1.0
            if how.temperature:
                kept = (scores / how.temperature).softmax(-1)
                if how.top_k:
                    kept[kept < kept.topk(how.top_k).values[-1]] = 0
                token = int(torch.multinomial(kept, 1, generator=draw))
            else:
                token = int(scores.argmax())
            said.append(token)
            likely.append({token: Logprob((scores / heat).log_softmax(-1)[token].item())})
            if token in ends:
                reason = "stop"
                break
        return RequestOutput([CompletionOutput(said, reason, likely if how.logprobs is not None else None)], before)


def stand_in(patch: Any) -> ModuleType:
    """Put it where `import vllm` finds it, on a card of which it may have all."""
    here, lora, request = sys.modules[__name__], ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    request.LoRARequest = LoRARequest  # type: ignore[attr-defined]
    for name, module in {"vllm": here, "vllm.lora": lora, "vllm.lora.request": request}.items():
        patch.setitem(sys.modules, name, module)
    patch.setattr(torch.cuda, "mem_get_info", lambda: (80, 100))
    patch.setattr(torch.cuda, "empty_cache", lambda: None)
    CALLS.clear()
    ENGINES.clear()
    STRENGTH[0] = 1.0
    return here
