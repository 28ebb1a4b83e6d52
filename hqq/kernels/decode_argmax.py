"""The likeliest token of each row and what follows from it, in one kernel at the end of a decoding step."""

# Kernels are written in Triton's language, which is not quite Python.
# mypy: ignore-errors

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqq.kernels.decode_advance import Rows, move_on
from hqq.kernels.decode_launch import on, options
from hqq.kernels.dequant_flow import start_next, wait_for_previous

_BLOCK = 1024
_WORST = tl.constexpr(-float("inf"))


@triton.jit
def _argmax_kernel(
    logits,
    best,
    where,
    arrived,
    token,
    finished,
    ids,
    positions,
    ends,
    ids_stride,
    pad,
    stride,
    V,
    BLOCKS: tl.constexpr,
    BLOCKS_PAD: tl.constexpr,
    ENDS: tl.constexpr,
    ENDS_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The best of BLOCK logits for each program; the last one of a row picks the row's best and moves the row on."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    v = block * BLOCK + tl.arange(0, BLOCK)
    if OVERLAP:
        start_next()
        wait_for_previous()
    x = tl.load(logits + row * stride + v, mask=v < V, other=_WORST).to(tl.float32)
    top, index = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best + row * BLOCKS + block, top)
    tl.store(where + row * BLOCKS + block, block * BLOCK + index)
    tl.debug_barrier()
    if tl.atomic_add(arrived + row, 1, sem="acq_rel", scope="gpu") == BLOCKS - 1:
        tl.store(arrived + row, 0)
        i = tl.arange(0, BLOCKS_PAD)
        tops = tl.load(best + row * BLOCKS + i, mask=i < BLOCKS, other=_WORST, cache_modifier=".cg")
        found = tl.load(where + row * BLOCKS + i, mask=i < BLOCKS, other=0x7FFFFFFF, cache_modifier=".cg")
        # Of equal logits the first token. Where nothing compares (NaN), still a token.
        first = tl.min(tl.where(tops == tl.max(tops, 0), found, 0x7FFFFFFF), 0)
        first = tl.minimum(first, V - 1)
        move_on(row, first, token, finished, ids, positions, ends, ids_stride, pad, ENDS, ENDS_PAD)


@dataclass(frozen=True)
class ArgmaxSpace:
    """Memory that `greedy_advance` works in; one serves all steps of one batch size and vocabulary."""

    best: Tensor
    where: Tensor
    arrived: Tensor

    @classmethod
    def make(cls, rows: int, V: int, device: torch.device) -> ArgmaxSpace:
        """Return the memory for `rows` rows of `V` logits."""
        blocks = triton.cdiv(V, _BLOCK)
        return cls(
            torch.empty(rows, blocks, dtype=torch.float32, device=device),
            torch.empty(rows, blocks, dtype=torch.int32, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
        )


def greedy_advance(logits: Tensor, rows: Rows, space: ArgmaxSpace) -> None:
    """Choose the likeliest token of each row, the first of equal ones, and move the rows on, all in place.

    logits [B, V], with contiguous rows.
    """
    count, V = logits.shape
    blocks = space.best.shape[1]
    with on(logits.device):
        _argmax_kernel[(blocks, count)](
            logits,
            space.best,
            space.where,
            space.arrived,
            *rows.arguments(),
            logits.stride(0),
            V,
            BLOCKS=blocks,
            BLOCKS_PAD=triton.next_power_of_2(blocks),
            BLOCK=_BLOCK,
            num_warps=4,
            **rows.constants(),
            **options(logits.device, logits.dtype),
        )
