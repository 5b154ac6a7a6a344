"""The forward pass of a Llama, Qwen2 or Qwen3 as rows of tokens over a static cache, the adapter beside the weights.

A *row* is one token of one answer: (token, slot, position). A step takes a batch of rows, whatever they are: one token of each of
many answers (decoding), or many tokens of a few prompts (prefill). Each row's keys and values are written to its slot of the
cache at its position; then it attends to its slot from 0 to its own position. So one function serves both, no row is padded,
and what a row gives depends on its own slot alone: on no other row, as long as a matrix product treats its rows alike, which
holds where the number of rows is the same (generation/graphs.py keeps it so).

Per layer, from x (rows, hidden):

    q, k, v = W_qkv norm(x)        one product for the three, and for the adapter's A of the three
    write k, v; attend
    x += W_o attended
    g, u = W_gu norm(x)            one product for the two
    x += W_d (silu(g) u)

An adapter is W x + s B (A x) with s = alpha/r. A stands under W as more rows of the same matrix, so that one product gives W x
and A x, and s B is the transposed `up`, block diagonal over the joined projections. The joined weights are what the model
itself computes with from then on (its parameters become views), so that a base is in memory once; a 4-bit base is dequantised
once into them, which are the numbers that its own forward pass multiplies with.

`eager` on a CPU; on a GPU the pieces between products and attention are compiled by torch (`compiled`).
"""

from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROPE = ("default", "linear", "llama3")  # angles that depend on the position alone


class Projection(NamedTuple):
    """Several linear layers of one input as one, and the adapter beside them."""

    weight: Tensor  # (out + rank, in): W, and the adapter's A below it
    bias: Tensor | None  # (out + rank,)
    up: Tensor | None  # (rank, out): s B, transposed; None without an adapter
    down: Tensor | None  # (rank, in): A in fp32, where the adapter computes in fp32 beside W of another dtype


class Layer(NamedTuple):
    norm1: Tensor
    qkv: Projection
    q_norm: Tensor | None  # (head,), Qwen3
    k_norm: Tensor | None
    o: Projection
    norm2: Tensor
    gate_up: Projection
    down: Projection


def unsupported(model: Any) -> str | None:
    """Why this pass can't be a model's, or None."""
    config, name = model.config, type(model).__name__
    if name not in ARCHITECTURES:
        return f"{name} is none of {', '.join(ARCHITECTURES)}"
    rope = getattr(model.model.rotary_emb, "rope_type", "default")
    if rope not in ROPE:
        return f"its rotary embedding is {rope}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        return "it attends in sliding windows"
    if getattr(config, "mlp_bias", False) or model.model.layers[0].self_attn.o_proj.bias is not None:
        return "it has biases beside those of q, k and v"
    return None


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def project(x: Tensor, p: Projection) -> Tensor:
    y = F.linear(x, p.weight, p.bias)
    if p.up is None:
        return y
    out = p.up.shape[1]
    if p.down is None:
        low = y[:, out:] @ p.up
        return (y[:, :out].float() + low.float()).to(x.dtype)  # in fp32, so that the sum is part of what follows it
    return (y[:, :out].float() + F.linear(x.float(), p.down) @ p.up).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (rows, heads, head); cos and sin: (rows, head)."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def before(x: Tensor, w: Layer, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slot: Tensor, at: Tensor,
           eps: float) -> Tensor:  # fmt: skip
    """q (rows, heads, head) of a layer; its k and v are in the cache. keys, values: (slots, kv heads, length, head)."""
    heads, size = keys.shape[1], keys.shape[3]
    y = project(norm(x, w.norm1, eps), w.qkv).view(len(x), -1, size)
    q, k, v = y.split((y.shape[1] - 2 * heads, heads, heads), 1)
    if w.q_norm is not None and w.k_norm is not None:
        q, k = norm(q, w.q_norm, eps), norm(k, w.k_norm, eps)
    place = (slot[:, None], torch.arange(heads, device=x.device)[None], at[:, None])
    keys.index_put_(place, rotate(k, cos, sin))
    values.index_put_(place, v)
    return rotate(q, cos, sin)


def after(x: Tensor, attended: Tensor, w: Layer, eps: float) -> Tensor:
    x = x + project(attended.reshape(len(x), -1), w.o)
    gate, up = project(norm(x, w.norm2, eps), w.gate_up).chunk(2, -1)
    return x + project(F.silu(gate) * up, w.down)


def top(x: Tensor, weight: Tensor, head: Tensor, eps: float) -> Tensor:
    """(rows, vocabulary): logits."""
    return F.linear(norm(x, weight, eps), head)


def compile_own(piece: Callable) -> Callable:
    """`piece`, compiled for one engine. torch keeps what it has compiled with a function's code, at most eight kinds of it in a
    process, and runs the ninth as it stands: which rounds otherwise, so that a later engine would give the same prompt another
    answer. So each engine has a copy of the code, and what can't be compiled whole is an error."""
    own: Any = piece  # which mypy knows no code of
    copy = FunctionType(own.__code__.replace(), own.__globals__, own.__name__)
    return torch.compile(copy, dynamic=False, fullgraph=True)


class Decoder:
    """The weights of a model, joined, and its forward pass. `adapter`: peft's name of the adapter beside them, if there is one.

    exact: the adapter computes in fp32 beside a base of another dtype, as peft does; else it is rounded to the base's dtype.
    """

    def __init__(self, model: Any, adapter: str = "default", exact: bool = False):
        config, body = model.config, model.model
        self.model, self.name, self.exact = model, adapter, exact
        self.eps, self.dtype, self.device = config.rms_norm_eps, body.embed_tokens.weight.dtype, body.embed_tokens.weight.device
        attention = body.layers[0].self_attn
        self.size = attention.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.embedding, self.norm, self.head = body.embed_tokens.weight, body.norm.weight, model.lm_head.weight
        self.parts = [_parts(layer) for layer in body.layers]
        self.layers = []
        for layer, parts in zip(body.layers, self.parts, strict=True):
            qkv, o, gate_up, down = (self._join(part) for part in parts)
            norms = (getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm"))
            q_norm, k_norm = (None if one is None else one.weight for one in norms)
            self.layers.append(
                Layer(layer.input_layernorm.weight, qkv, q_norm, k_norm, o, layer.post_attention_layernorm.weight, gate_up, down)
            )
        self.before: Callable = before
        self.after: Callable = after
        self.top: Callable = top
        self.load()

    def compiled(self) -> None:
        """Have torch compile what lies between the products. Shapes are fixed, all layers share one code."""
        self.before, self.after, self.top = (compile_own(piece) for piece in (before, after, top))

    def angles(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin (length, head) of the model's own rotary embedding."""
        places = torch.arange(length, device=self.device)[None]
        cos, sin = self.model.model.rotary_emb(self.embedding[:1], places)
        return cos[0], sin[0]

    def cache(self, slots: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values: (layers, slots, kv heads, length, head)."""
        shape = (len(self.layers), slots, self.kv_heads, length, self.size)
        return torch.zeros(shape, dtype=self.dtype, device=self.device), torch.zeros(shape, dtype=self.dtype, device=self.device)

    def forward(self, token: Tensor, slot: Tensor, at: Tensor, cache: tuple[Tensor, Tensor], angles: tuple[Tensor, Tensor],
                attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:  # fmt: skip
        """x (rows, hidden) before the last norm. attend: (q, keys, values of a layer) -> (rows, heads, head)."""
        x, (cos, sin) = F.embedding(token, self.embedding), (one[at] for one in angles)
        for n, w in enumerate(self.layers):
            keys, values = cache[0][n], cache[1][n]
            q = self.before(x, w, cos, sin, keys, values, slot, at, self.eps)
            x = self.after(x, attend(q, keys, values), w, self.eps)
        return x

    def logits(self, x: Tensor) -> Tensor:
        return self.top(x, self.norm, self.head, self.eps)

    def plain_logits(self, x: Tensor) -> Tensor:
        """The same of any number of rows: nothing is compiled for it."""
        return top(x, self.norm, self.head, self.eps)

    # -- weights ------------------------------------------------------------------------------------------------------------

    def _join(self, modules: list[Any]) -> Projection:
        """One matrix of several linear layers, which from now on are views of it; room for the adapter's A below."""
        bases = [getattr(module, "base_layer", module) for module in modules]
        weights = [_plain(base, self.dtype) for base in bases]
        ranks = sum(len(module.lora_A[self.name].weight) for module in modules if self.name in getattr(module, "lora_A", ()))
        wide = self.exact and self.dtype != torch.float32
        out = sum(map(len, weights))
        joined = weights[0].new_zeros(out + (0 if wide else ranks), weights[0].shape[1])
        torch.cat(weights, out=joined[:out])
        for base, part in zip(bases, joined[:out].split([*map(len, weights)]), strict=True):
            if not hasattr(base.weight, "quant_state"):
                base.weight.data = part
        bias = None
        if bases[0].bias is not None:  # of q, k and v alike (`unsupported`)
            bias = joined.new_zeros(len(joined))
            torch.cat([base.bias.data for base in bases], out=bias[:out])
        if not ranks:
            return Projection(joined, bias, None, None)
        low = torch.float32 if wide else self.dtype
        up = joined.new_zeros(ranks, out, dtype=low)
        return Projection(joined, bias, up, joined.new_zeros(ranks, joined.shape[1], dtype=low) if wide else None)

    @torch.no_grad()
    def load(self, strength: float = 1.0) -> None:
        """Copy the adapter, as it is in the model now, into the joined weights, at a multiple of its strength."""
        for joined, module, out, rank in self._places():
            a, b = (getattr(module, side)[self.name].weight for side in ("lora_A", "lora_B"))
            assert joined.up is not None
            joined.up[rank, out] = (b.detach().float() * (module.scaling[self.name] * strength)).T.to(joined.up.dtype)
            self._low(joined)[rank] = a.detach().to(joined.up.dtype)

    def updates(self) -> Iterator[tuple[str, Tensor, Tensor, float]]:
        """(name of the module in peft's files, A, B, alpha/r) of each layer, as they are in the joined weights."""
        names = {module: name for name, module in self.model.named_modules()}
        for joined, module, out, rank in self._places():
            assert joined.up is not None
            scale = module.scaling[self.name]
            a, b = self._low(joined)[rank].float(), joined.up[rank, out].T.float() / scale
            yield f"base_model.model.{names[module]}", a, b, scale

    def _low(self, joined: Projection) -> Tensor:
        return joined.weight[-len(joined.up) :] if joined.down is None else joined.down  # type: ignore[arg-type]

    def _places(self) -> Iterator[tuple[Projection, Any, slice, slice]]:
        """(the joined projection, the adapted module, its outputs, its ranks) of every adapted linear layer."""
        for layer, parts in zip(self.layers, self.parts, strict=True):
            for joined, modules in zip((layer.qkv, layer.o, layer.gate_up, layer.down), parts, strict=True):
                out = rank = 0
                for module in modules:
                    width = getattr(module, "base_layer", module).out_features
                    if self.name in getattr(module, "lora_A", ()):
                        r = module.lora_A[self.name].weight.shape[0]
                        yield joined, module, slice(out, out + width), slice(rank, rank + r)
                        rank += r
                    out += width


def _parts(layer: Any) -> tuple[list[Any], ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return (
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    )


def _plain(base: Any, dtype: torch.dtype) -> Tensor:
    """The weight that a linear layer multiplies with: a 4-bit one dequantised."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return base.weight.data
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.data, state).to(dtype)
