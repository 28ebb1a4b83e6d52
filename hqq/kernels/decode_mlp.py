"""The gated activation of a decoding step."""

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

_BLOCK = 1024


@triton.jit
def _silu_mul_kernel(
    gate,
    up,
    out,
    gate_stride,
    up_stride,
    N,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out = silu(gate) * up, both steps rounded to DTYPE: BLOCK columns of one row for each program."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    there = n < N
    if OVERLAP:
        start_next()
        wait_for_previous()
    g = tl.load(gate + row * gate_stride + n, mask=there, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + n, mask=there, other=0.0).to(tl.float32)
    activated = rounded(g / (1 + tl.exp(-g)), DTYPE, INTERPRETED)
    tl.store(out + row * N + n, rounded(activated * u, DTYPE, INTERPRETED).to(DTYPE), mask=there)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) * up` [B, N]; both [B, N] of one dtype, with contiguous rows."""
    rows, N = gate.shape
    out = decode_launch.new_output(gate, N)
    with on(gate.device):
        _silu_mul_kernel[(triton.cdiv(N, _BLOCK), rows)](
            gate,
            up,
            out,
            gate.stride(0),
            up.stride(0),
            N,
            BLOCK=_BLOCK,
            num_warps=4,
            **options(gate.device, gate.dtype),
        )
    return out
