"""Fewer kernels for the same arithmetic: a linear layer with its adapter as one function, and what lies between the products.

Most of the GPU time of a plain step goes into kernels that read and write whole activations (docs/performance.md): peft casts a
layer's input to fp32 for the dropout and back, scales, adds, and autograd takes each of these back again. And each kernel is a
launch, which a processor pays for.

`Beside`: y = W x + b + s B A D(x), with D the dropout (Hu et al. 2022, arXiv:2106.09685, eq. 3), forwards as two products and one
that adds into y, backwards as the products that the gradients are:

    dh = s dy B      dB = s dy^T h, h = A D(x)      dA = dh^T D(x)      dx = dy W + D'(dh A)

The adapter stays fp32; its factors are rounded to the precision of W for the products, as autocast does, and gradients come
back as fp32. The product is added to W x before that is rounded, where peft rounds both, and the product times s: the same
within rounding. D(x) is computed again backwards, from x and the mask, and not kept.

`compile_pieces`: RMSNorm, the rotary embedding and the gate of the MLP, each one kernel by torch.compile, with the formulas of
generation/decoder.py and their derivatives. They are compiled once for all layers, in seconds; whole layers take a minute.
"""

import sys
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DECODERS = ("LlamaModel", "Qwen2Model", "Qwen3Model")  # whose layers are called as training/captured.py does


class Beside(torch.autograd.Function):
    """(x, W, bias, A, B, s, rate of the dropout) -> W x + bias + s B A D(x); x: (..., in), W: (out, in), frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float,
                rate: float) -> Tensor:  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])
        a, b = down.to(x.dtype), up.to(x.dtype)
        dropped, mask = torch.native_dropout(flat, rate, True) if rate else (flat, None)
        low = dropped @ a.T
        y = F.linear(flat, weight, None if bias is None else bias.to(x.dtype)).addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(flat, weight, a, b, low, mask)
        ctx.scale, ctx.rate, ctx.kinds = scale, rate, (down.dtype, up.dtype)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        flat, weight, a, b, low, mask = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        dlow = (dy @ b) * ctx.scale
        again = 1 / (1 - ctx.rate)
        dropped = flat if mask is None else torch.ops.aten.native_dropout_backward(flat, mask, again)
        dup, ddown = (dy.T @ low).to(ctx.kinds[1]) * ctx.scale, (dlow.T @ dropped).to(ctx.kinds[0])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            if mask is None:
                dx.addmm_(dlow, a)
            else:
                dx += torch.ops.aten.native_dropout_backward(dlow @ a, mask, again)
            dx = dx.view(*grads[0].shape[:-1], -1)
        return dx, None, None, ddown, dup, None, None


class Linear:
    """The forward pass of one of peft's linear layers, where one plain adapter acts; else peft's own."""

    def __init__(self, layer: Any):
        self.layer, self.plain = layer, layer.forward

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.layer
        names = [] if layer.disable_adapters or layer.merged else [one for one in layer.active_adapters if one in layer.lora_A]
        weight = layer.base_layer.weight
        if args or kwargs or len(names) != 1 or x.dtype != weight.dtype or names[0] in layer.lora_variant:
            return self.plain(x, *args, **kwargs)
        name = names[0]
        dropout = layer.lora_dropout[name]
        rate = getattr(dropout, "p", 0.0) if dropout.training else 0.0
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        with torch.autocast(x.device.type, enabled=False):
            return Beside.apply(x, weight, layer.base_layer.bias, a, b, layer.scaling[name], rate)  # type: ignore[no-any-return]


def fuse(model: Any) -> int:
    """Have the linear layers of a peft model go by `Beside`. Returns how many did: no 4-bit one before it is dequantised."""
    found = 0
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        weight = getattr(base, "weight", None)
        if not hasattr(module, "lora_A") or not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
            continue
        if (
            weight.requires_grad
            or getattr(module, "fan_in_fan_out", False)
            or any(one.bias is not None for one in module.lora_B.values())
        ):
            continue
        module.forward = Linear(module)
        found += 1
    return found


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def norm_back(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """With r = 1/rms(x) and d = w dy: dx = r (d - x r^2 mean(d x))."""
    wide, d = x.float(), (weight * dy).float()
    r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (r * (d - wide * r * r * (d * wide).mean(-1, keepdim=True))).to(x.dtype)


def gate(g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g) * u


def gate_back(dy: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """silu(g) = g s with s the logistic function of g; its derivative is s (1 + g (1 - s))."""
    wide = g.float()
    s = torch.sigmoid(wide)
    return (dy.float() * u.float() * s * (1 + wide * (1 - s))).to(g.dtype), (dy.float() * wide * s).to(u.dtype)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q, k: (rows, heads, tokens, size); cos and sin: (rows, tokens, size)."""
    cos, sin = cos[:, None], sin[:, None]

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    return turned(q), turned(k)


def rotate_back(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The transposed of `rotate`, for any cos and sin."""
    cos, sin = cos[:, None], sin[:, None]

    def turned(dy: Tensor) -> Tensor:
        first, second = (dy * sin).chunk(2, -1)
        return dy * cos + torch.cat((second, -first), -1)

    return turned(dq), turned(dk)


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, codes: tuple) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.back = eps, codes[1]
        return codes[0](x.detach(), weight, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return ctx.back(grads[0], *ctx.saved_tensors, ctx.eps), None, None, None


class Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, codes: tuple) -> Tensor:
        ctx.save_for_backward(g, u)
        ctx.back = codes[1]
        return codes[0](g.detach(), u.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return *ctx.back(grads[0], *ctx.saved_tensors), None


class Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, codes: tuple) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.back = codes[1]
        return codes[0](q.detach(), k.detach(), cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return *ctx.back(*grads, *ctx.saved_tensors), None, None, None


def knows(body: Any) -> bool:
    """Whether a decoder's norms, angles and gates are those above."""
    return type(body).__name__ in DECODERS and body.config.hidden_act == "silu"


def compile_pieces(body: Any) -> int:
    """Compile what lies between the products of a decoder that it `knows`. Returns how many pieces there are.

    Forwards and backwards are compiled apart, and not by autograd from one into the other: it compiles other code where no
    gradient is taken, which rounds otherwise, and a reference would then differ from the policy before the first step.
    """

    import torch._dynamo

    # Of one function it keeps eight kinds, and runs the ninth as it stands, which rounds otherwise: other dtypes and shapes of a
    # process's models are kinds, too. Tensors are detached, so that whether one wants a gradient is none.
    torch._dynamo.config.recompile_limit = 64

    def code(piece: Any) -> Any:
        return torch.compile(piece, dynamic=True)

    norms, gates, angles = (
        (code(there), code(back)) for there, back in ((norm, norm_back), (gate, gate_back), (rotate, rotate_back))
    )

    def normed(self: Any, x: Tensor) -> Tensor:
        return Norm.apply(x, self.weight, self.variance_epsilon, norms)  # type: ignore[no-any-return]

    def gated(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(Gate.apply(self.gate_proj(x), self.up_proj(x), gates))  # type: ignore[no-any-return]

    found = 0
    for module in body.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = MethodType(normed, module)
        elif hasattr(module, "gate_proj"):
            module.forward = MethodType(gated, module)
        else:
            continue
        found += 1
    model_code: Any = sys.modules[type(body).__module__]  # a function of the model's module, which its attention calls by name
    model_code.apply_rotary_pos_emb = lambda q, k, cos, sin, unsqueeze_dim=1: Rotation.apply(q, k, cos, sin, angles)
    return found + len(body.layers)
