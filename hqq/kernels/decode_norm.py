"""Residual sum and RMS norm of a decoding step, in one kernel."""

# Kernels are written in Triton's language, which is not quite Python.
# mypy: ignore-errors

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from hqq.kernels import decode_launch
from hqq.kernels.decode_launch import PIECE, ask_for, on, options, overlaps, rounded
from hqq.kernels.dequant_flow import start_next, wait_for_previous

_WARP_COLUMNS = 256
# Bytes of a cache that are worth asking for ahead of the attention.
_MOST_AHEAD = 8 << 20


@triton.jit
def _add_norm_kernel(
    hidden,
    delta,
    weight,
    out,
    keys,
    values,
    begins,
    positions,
    K,
    eps,
    length,
    ADD: tl.constexpr,
    AHEAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PLACE_BYTES: tl.constexpr,
    THREADS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """hidden += delta; out = weight * hidden / sqrt(mean(hidden^2) + eps): one row of [B, K] for each program.

    Every intermediate that transformers keeps in DTYPE is rounded to it.
    """
    k = tl.arange(0, BLOCK)
    there = k < K
    at = tl.program_id(0).to(tl.int64) * K + k
    w = tl.load(weight + k, mask=there, other=0.0).to(tl.float32)
    if OVERLAP:
        start_next()
        wait_for_previous()
    x = tl.load(hidden + at, mask=there, other=0.0).to(tl.float32)
    if ADD:
        x = rounded(x + tl.load(delta + at, mask=there, other=0.0).to(tl.float32), DTYPE, INTERPRETED)
        tl.store(hidden + at, x.to(DTYPE), mask=there)
    normed = rounded(x * tl.rsqrt(tl.sum(x * x, 0) / K + eps), DTYPE, INTERPRETED)
    tl.store(out + at, rounded(w * normed, DTYPE, INTERPRETED).to(DTYPE), mask=there)
    if AHEAD:
        row = tl.program_id(0)
        begin = tl.load(begins + row)
        first = (row.to(tl.int64) * KV_HEADS * length + begin) * PLACE_BYTES
        filled = (tl.minimum(tl.load(positions + row), length) - begin) * PLACE_BYTES
        _ask_for_heads(keys.to(tl.int64) + first, filled, length * PLACE_BYTES, KV_HEADS, THREADS)
        _ask_for_heads(values.to(tl.int64) + first, filled, length * PLACE_BYTES, KV_HEADS, THREADS)


@triton.jit
def _ask_for_heads(start, filled, distance, HEADS: tl.constexpr, THREADS: tl.constexpr):
    """Have the first `filled` bytes of each head, which are `distance` bytes apart, come to the second-level cache."""
    pieces = filled // PIECE
    for i in range(0, HEADS * pieces, THREADS):
        piece = i + tl.arange(0, THREADS)
        at = start + (piece // pieces).to(tl.int64) * distance + piece % pieces * PIECE
        ask_for(at, piece < HEADS * pieces)


@dataclass(frozen=True)
class Cache:
    """The cache of the attention that comes next: keys and values [B, KV, length, D], and what rows fill of them."""

    keys: Tensor
    values: Tensor
    begins: Tensor
    positions: Tensor

    @property
    def place_bytes(self) -> int:
        """Bytes of one head of one token."""
        return self.keys.shape[3] * self.keys.element_size()

    def worth_asking_for(self) -> bool:
        """Whether it pays to have it fetched while the kernel in between runs: much would only be in its way."""
        return (
            overlaps(self.keys.device)
            and self.place_bytes % 16 == 0
            and self.keys.nbytes + self.values.nbytes <= _MOST_AHEAD
        )


def add_norm(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float, cache: Cache | None = None
) -> Tensor:
    """Add `delta` to `hidden` in place, and return the RMS norm of the sum times `weight`.

    hidden, delta [B, K] and weight [K] of one dtype, contiguous; None adds nothing. The filled part of `cache`, which
    is for the same B rows, is asked for on the side.
    """
    rows, K = hidden.shape
    out = decode_launch.new_output(hidden, K)
    block = triton.next_power_of_2(K)
    warps = max(1, min(16, block // _WARP_COLUMNS))
    ahead = cache is not None and cache.worth_asking_for()
    tensors = (cache.keys, cache.values, cache.begins, cache.positions) if ahead else (hidden,) * 4
    with on(hidden.device):
        _add_norm_kernel[(rows,)](
            hidden,
            hidden if delta is None else delta,
            weight,
            out,
            *tensors,
            K,
            eps,
            cache.keys.shape[2] if ahead else 0,
            ADD=delta is not None,
            AHEAD=ahead,
            KV_HEADS=cache.keys.shape[1] if ahead else 1,
            PLACE_BYTES=cache.place_bytes if ahead else 1,
            THREADS=32 * warps,
            BLOCK=block,
            num_warps=warps,
            **options(hidden.device, hidden.dtype),
        )
    return out
