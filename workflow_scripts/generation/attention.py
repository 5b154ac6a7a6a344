"""Attention of rows over a static cache: a row attends to its slot, from 0 to its own position.

On a GPU one Triton kernel, for decoding and prefill alike: a program takes a row and a KV head with the query heads that
share it, and goes through the cache in blocks from the start, with the online softmax of Dao et al. 2022 (arXiv:2205.14135).
It reads what the row needs and no more, and the order of its sums depends on the row's position alone. On a CPU, torch's
scaled_dot_product_attention on the slots as they lie (decoding), or slot by slot (prefill).
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # positions that a program of the kernel takes at once; a cache is as long as a number of these


def of_slots(rows: int, at: Tensor, longest: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Row i is slot i, on a CPU. longest: above every position in `at` (rows,)."""
    mask = (torch.arange(longest)[None] <= at[:, None])[:, None, None]

    def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        heads, size = keys.shape[1], keys.shape[3]
        grouped = q.view(rows, heads, -1, size)  # query heads that share a KV head are rows of one product
        return F.scaled_dot_product_attention(grouped, keys[:rows, :, :longest], values[:rows, :, :longest], mask)

    return attend


def of_spans(spans: list[tuple[int, int, int]]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """On a CPU. spans: (slot, first position, how many) of the rows, one after the other."""

    def mask_of(first: int, count: int) -> Tensor | None:
        return torch.arange(first + count)[None] <= torch.arange(first, first + count)[:, None] if first else None

    masks = [mask_of(first, count) for _, first, count in spans]

    def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        out, row = torch.empty_like(q), 0
        for (slot, first, count), mask in zip(spans, masks, strict=True):
            last = first + count
            found = F.scaled_dot_product_attention(
                q[row : row + count].transpose(0, 1)[None], keys[slot, None, :, :last], values[slot, None, :, :last],
                mask, is_causal=mask is None, enable_gqa=True,
            )  # fmt: skip
            out[row : row + count] = found[0].transpose(0, 1)
            row += count
        return out

    return attend


def on_gpu(slot: Tensor, at: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """slot, at: (rows,) of each row, on the GPU; their contents may change between calls."""
    from workflow_scripts.generation.attention_kernel import launch

    return partial(launch, BLOCK, slot, at)
