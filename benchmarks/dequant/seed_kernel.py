"""A stand-alone dequantisation kernel as it was published before this library had its own, re-created as a peer.

Its description: 8 and 4 bit, both axes, power-of-two groups; adjacent rows of the weight share a byte; one program
takes a block of packed elements, computes each element's group from its position, and loads scale and zero for it.
"""

# Written in Triton's language.
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _adjacent_rows_kernel(
    W_q,
    out,
    scale,
    zero,
    count,
    K: tl.constexpr,
    GROUPS_APART: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    AXIS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    packed = tl.load(W_q + index, mask=inside)
    fields: tl.constexpr = 8 // BITS
    row, column = index // K, index % K
    for i in tl.static_range(fields):
        codes = ((packed >> (8 - BITS - BITS * i)) & ((1 << BITS) - 1)).to(out.dtype.element_ty)
        flat = (row * fields + i) * K + column
        group = flat // GROUP_SIZE if AXIS == 1 else flat % GROUPS_APART
        s = tl.load(scale + group, mask=inside)
        z = tl.load(zero + group, mask=inside)
        tl.store(out + flat, (codes - z) * s, mask=inside)


def pack_adjacent_rows(codes: Tensor, bits: int) -> Tensor:
    """Return codes [N, K] (uint8) with `8 / bits` neighbouring rows in each byte, first row in the highest bits."""
    fields = 8 // bits
    packed = torch.zeros_like(codes[::fields])
    for i in range(fields):
        packed |= codes[i::fields] << (bits * (fields - 1 - i))
    return packed


def dequantize_adjacent_rows(
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    shape: tuple[int, int],
    gs: int,
    axis: int,
    block: int,
) -> Tensor:
    """Return `(W_q - zero) * scale` [N, K] for codes packed by `pack_adjacent_rows`."""
    N, K = shape
    out = torch.empty(shape, dtype=scale.dtype, device=W_q.device)
    grid = (triton.cdiv(W_q.numel(), block),)
    _adjacent_rows_kernel[grid](
        W_q, out, scale, zero, W_q.numel(), K, N * K // gs, gs, bits, axis, block, enable_fp_fusion=False
    )
    return out
