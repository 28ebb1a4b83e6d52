"""Residual sum and RMS norm of a decoding step, in one kernel."""

# Kernels are written in Triton's language, which is not quite Python.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hqq.kernels import decode_launch
from hqq.kernels.decode_launch import options
from hqq.kernels.dequant_flow import start_next, wait_for_previous
from hqq.kernels.device import on
from hqq.kernels.rounding import rounded

_WARP_COLUMNS = 256


@triton.jit
def _add_norm_kernel(
    hidden,
    delta,
    weight,
    out,
    K,
    eps,
    ADD: tl.constexpr,
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


def add_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add `delta` to `hidden` in place, and return the RMS norm of the sum times `weight`.

    hidden, delta [B, K] and weight [K] of one dtype, contiguous; None adds nothing.
    """
    rows, K = hidden.shape
    out = decode_launch.new_output(hidden, K)
    block = triton.next_power_of_2(K)
    with on(hidden.device):
        _add_norm_kernel[(rows,)](
            hidden,
            hidden if delta is None else delta,
            weight,
            out,
            K,
            eps,
            ADD=delta is not None,
            BLOCK=block,
            num_warps=max(1, min(16, block // _WARP_COLUMNS)),
            **options(hidden.device, hidden.dtype),
        )
    return out
