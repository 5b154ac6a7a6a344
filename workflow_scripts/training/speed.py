"""How a training computes on a GPU: without the padding, with the 4-bit base dequantised once, in fewer kernels and launches.

Each decides no number beyond the order of sums (dropout draws for other shapes, as it does for another micro-batch), can be
switched off in the config's `speed`, and is written to run.json as it was found. On a CPU, and on a card or a model that one
does not fit, it is left alone.

- `unpadded`: a batch goes through the decoder as one row of its real tokens, each text from position 0 on, and the hidden states
  are put back where the trainer expects them; attention is FlashAttention's for texts of several lengths, as torch has it
  (torch.nn.attention.varlen). It is done at the decoder, by hooks, and so for every trainer alike; TRL has it for SFT alone.
- `dequantised`: what a 4-bit layer multiplies with, kept in the training's precision: the same products (bitsandbytes
  dequantises for each, forwards and backwards); 2 bytes a parameter more, which the generator of rollouts shares.
- `fused`: a layer with its adapter as one function (training/fused.py). It rounds once where peft rounds three times.
- `compiled`: what lies between the products, each piece by torch.compile with dynamic shapes (training/fused.py): from so many
  micro-batches on, since that takes some seconds. Not under `deterministic: true`.
- `captured`: the layers as CUDA graphs (training/captured.py).

Then there is what a step costs a processor whatever the rows (`lean`): it changes nothing that is computed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workflow_scripts.plumbing import ranks

NAME = "unpadded"  # of the attention, in transformers' table
FLASH = (8, 0)  # the oldest compute capability that FlashAttention runs on
WIDEST = 256  # its largest head
PAGED_FROM = 100_000  # numbers in a tensor (bitsandbytes, optim/optimizer.py, get_state_buffer)


def hinders_unpadding(model: Any, step: dict) -> str | None:
    """Why a model's batches keep their padding, or None."""
    config = model.config.get_text_config()
    if step["device"] != "cuda" or step["precision"] == "fp32" or torch.cuda.get_device_capability() < FLASH:
        return "FlashAttention wants a GPU of capability 8.0 or newer, and 16 bits"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        return "the model attends in sliding windows"
    if getattr(model.base_model, "rotary_emb", None) is None:
        return "the model's positions are not rotary: where a text begins in a padded row would count"
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "attention_dropout", 0.0):
        return "the model's attention has a soft cap, or dropout"
    if model.config._attn_implementation != "sdpa" or not getattr(model, "_supports_sdpa", False):
        return "the model's attention is its own"
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return f"its heads are {size} wide" if size > WIDEST or size % 8 else None


def prepare(model: Any, job: Any) -> None:
    """Have a model that was just loaded go without padding and by compiled pieces, where it can.

    Before there is a trainer: it may compute its reference when it is made, which has to round as what is trained does."""
    from workflow_scripts.training import fused

    body = model.base_model
    if job.speed.get("unpadded"):
        if reason := hinders_unpadding(model, job.step):
            print(f"batches keep their padding: {reason}", flush=True)
        else:
            Unpadded(model)
    if fused.knows(body) and enough_to_compile(job) and not ranks.in_step:
        if wants_pieces(job):
            body.compiled_pieces = fused.compile_pieces(body)
        else:
            print("nothing is compiled: `deterministic: true`", flush=True)


def wants_pieces(job: Any) -> bool:
    """Whether what lies between the products is to be compiled, where the model is one that it can be done for.

    Not where runs are to end with the same bytes: Inductor chooses tiles by the batch that it sees first, which a resume changes.
    """
    return enough_to_compile(job) and not job.deterministic


def enough_to_compile(job: Any) -> bool:
    wanted = job.speed.get("compiled") and job.step["device"] == "cuda" and not job.config["train"].get("gradient_checkpointing")
    return bool(wanted) and micro_batches(job) >= job.speed["compiled"]


class Unpadded:
    """The hooks around a model's decoder."""

    def __init__(self, model: Any):
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        self.places: Tensor | None = None  # of the real tokens, in the batch that is in the decoder
        self.shape: torch.Size | None = None
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, lambda *args, **more: sdpa_mask(*args, **more) if self.places is None else None)
        model.config._attn_implementation = NAME
        body = model.base_model
        body.register_forward_pre_hook(self.enter, with_kwargs=True)
        body.register_forward_hook(self.leave, always_call=True)

    def enter(self, body: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        ids, mask = args[0] if len(args) == 1 else kwargs.get("input_ids"), kwargs.get("attention_mask")
        cached = kwargs.get("use_cache") or kwargs.get("past_key_values") is not None
        if len(args) > 1 or ids is None or mask is None or mask.dim() != 2 or cached or kwargs.get("output_hidden_states"):
            return None
        real = mask.bool()
        self.shape, self.places = ids.shape, real.flatten().nonzero()[:, 0]
        ends = F.pad(real.sum(1).cumsum(0), (1, 0)).int()
        position = kwargs.get("position_ids")
        position = real.cumsum(1) - 1 if position is None else position.expand(ids.shape)
        longest = -(-ids.shape[1] // 256) * 256  # few different ones: compiled code is made for each
        found = {
            "input_ids": ids.flatten()[self.places][None], "position_ids": position.flatten()[self.places][None],
            "attention_mask": None, "use_cache": False,
            "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest,
        }  # fmt: skip
        return (), kwargs | found

    def leave(self, body: Any, args: tuple, output: Any) -> Any:
        places, self.places = self.places, None
        if places is None or output is None:
            return output
        hidden = output.last_hidden_state[0]
        assert self.shape is not None
        whole = hidden.new_zeros(self.shape.numel(), hidden.shape[-1]).index_copy(0, places, hidden)
        output.last_hidden_state = whole.view(*self.shape, -1)
        return output


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
           cu_seq_lens_q: Tensor | None = None, max_length_q: int | None = None, **more: Any) -> tuple[Tensor, None]:  # fmt: skip
    """Attention for transformers: q (1, heads, tokens, size), k and v with fewer heads; texts end at `cu_seq_lens_q`. Without
    these, scaled_dot_product_attention. Returns (1, tokens, heads, size)."""
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)  # type: ignore[return-value]
    if query.device.type == "cuda" and query.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (one[0].transpose(0, 1) for one in (query, key, value))
        grouped: Any = {"enable_gqa": True} if GROUPED and q.shape[1] != k.shape[1] else {}
        ends_and_longest: Any = cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q
        made: Any = varlen_attn(q, k, v, *ends_and_longest, scale=scaling, window_size=(-1, 0), **grouped)
        return made[None], None
    ends, found = cu_seq_lens_q.tolist(), []
    for a, b in zip(ends, ends[1:], strict=False):
        if b > a:
            q, k, v = query[:, :, a:b], key[:, :, a:b], value[:, :, a:b]
            found.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True))
    return torch.cat(found, 2).transpose(1, 2), None


def _asks_for_grouped() -> bool:
    """Later releases of torch want to be told where query heads share a head of keys; earlier ones take it unasked."""
    import inspect

    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


GROUPED = _asks_for_grouped()


class Dequantised(nn.Module):
    """In place of a 4-bit layer that is not trained: what that multiplies with, in the dtype that it computes in."""

    def __init__(self, layer: Any):
        from bitsandbytes.functional import dequantize_4bit

        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        made = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype)
        self.weight, self.bias = nn.Parameter(made, requires_grad=False), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return F.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)


def dequantise(model: Any) -> int:
    """Replace a peft model's 4-bit layers. Returns how many there were."""
    found = [module for module in model.modules() if type(getattr(module, "base_layer", None)).__name__ == "Linear4bit"]
    for module in found:
        module.base_layer = Dequantised(module.base_layer)
    return len(found)


def settle(trainer: Any, job: Any) -> dict[str, Any]:
    """What is done once a trainer is built and checked. Returns what was done, for run.json."""
    from workflow_scripts.training import captured, fused

    model, args, how = trainer.model, trainer.args, job.speed
    body = model.get_base_model().base_model
    unpadded = model.get_base_model().config._attn_implementation == NAME
    found: dict[str, Any] = {"unpadded": unpadded, "dequantised": 0, "fused": 0, "captured": False}
    found["compiled"] = getattr(body, "compiled_pieces", 0)
    if job.step["device"] != "cuda":
        return found
    lean(trainer)
    if how.get("dequantised"):
        found["dequantised"] = dequantise(model)
    if job.step["precision"] == "fp32":
        return found
    alone = not ranks.in_step  # layers whose weights are gathered when they compute are left as they are: not measured
    if how.get("fused") and alone:
        found["fused"] = fused.fuse(model)
    whole = not any(hasattr(parameter, "quant_state") for parameter in body.parameters())
    if (
        how.get("captured")
        and type(body).__name__ in fused.DECODERS
        and unpadded
        and whole
        and alone
        and not args.gradient_checkpointing
    ):
        trainer.recorder = captured.Captured(body)
        found["captured"] = True
    return found


def described(trainer: Any) -> dict[str, Any]:
    """What was done, at the end of a training: with what was recorded, and in how much memory."""
    recorder = getattr(trainer, "recorder", None)
    more = {} if recorder is None else {"recordings": recorder.count, "recordings_bytes": recorder.arena.capacity}
    return trainer.speed | more  # type: ignore[no-any-return]


def lean(trainer: Any) -> None:
    """Leave out what a step spends on walks over two thousand modules: to count operations for a figure that nobody reads, to
    switch to training what is training already, to clear the gradients of weights that have none. And bitsandbytes' optimiser
    waits for the card after each tensor, for the sake of those that are paged: tensors under 1e5 numbers never are.
    """
    model, train = trainer.model, trainer.model.train
    parameters = [*model.parameters()]

    def clear(set_to_none: bool = True) -> None:
        for parameter in parameters:
            parameter.grad = None

    trainer.floating_point_ops = lambda inputs: 0
    model.train = lambda mode=True: model if model.training == mode else train(mode)
    model.zero_grad = clear
    if type(trainer.optimizer).__module__.startswith("bitsandbytes") and all(
        parameter.numel() < PAGED_FROM for parameter in parameters if parameter.requires_grad
    ):
        import bitsandbytes.optim.optimizer as optimizer

        optimizer.sync_gpu = lambda tensor: None  # type: ignore[assignment]


def micro_batches(job: Any) -> float:
    """How many a training has, about."""
    train = job.config["train"]
    if train.get("max_steps", -1) > 0:
        return train["max_steps"] * train["gradient_accumulation_steps"]  # type: ignore[no-any-return]
    answers = train.get("num_generations", 1) * train.get("num_iterations", 1)
    rows = len(job.parents()["rows"].rows()) * answers
    return train["num_train_epochs"] * rows / train["per_device_train_batch_size"]  # type: ignore[no-any-return]
