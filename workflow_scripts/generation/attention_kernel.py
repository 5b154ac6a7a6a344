"""The Triton kernel of generation/attention.py. Imported on a GPU alone: torch for CPUs comes without Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def launch(block: int, slot: Tensor, at: Tensor, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(rows, heads, head) of q in the same shape; keys, values: (slots, kv heads, length, head)."""
    rows, heads, size = q.shape
    group = heads // keys.shape[1]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    attend[(rows, keys.shape[1])](
        q, keys, values, out, slot, at, size**-0.5, q.stride(0), q.stride(1), *keys.stride()[:3],
        GROUP=group, PADDED=max(16, 1 << (group - 1).bit_length()), SIZE=size, BLOCK=block, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit
def attend(q, keys, values, out, slot, at, scale, q_row, q_head, k_slot, k_head, k_at,
           GROUP: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    group, size = tl.arange(0, PADDED), tl.arange(0, SIZE)
    mine = group[:, None] < GROUP
    last = tl.load(at + row)
    start = tl.load(slot + row).to(tl.int64) * k_slot + head * k_head
    query = tl.load(q + row * q_row + (head * GROUP + group[:, None]) * q_head + size[None, :], mask=mine, other=0.0)
    highest = tl.full((PADDED,), float("-inf"), tl.float32)
    total = tl.zeros((PADDED,), tl.float32)
    summed = tl.zeros((PADDED, SIZE), tl.float32)
    for first in range(0, last + 1, BLOCK):
        place = first + tl.arange(0, BLOCK)
        there = place <= last
        block = start + place[:, None] * k_at + size[None, :]
        key = tl.load(keys + block, mask=there[:, None], other=0.0)
        value = tl.load(values + block, mask=there[:, None], other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(there[None, :], score, float("-inf"))
        new = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp(score - new[:, None])
        fade = tl.exp(highest - new)
        total = total * fade + tl.sum(weight, 1)
        summed = summed * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        highest = new
    tl.store(out + (row * tl.num_programs(1) * GROUP + head * GROUP + group[:, None]) * SIZE + size[None, :],
             (summed / total[:, None]).to(out.dtype.element_ty), mask=mine)  # fmt: skip
