"""Rounding inside Triton kernels, the same in the interpreter as on a GPU."""

# Written in Triton's language, which is not quite Python.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(x, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 `x` rounded to DTYPE (to nearest, ties to even), as fp32."""
    if tl.float32 == DTYPE:
        return x
    if INTERPRETED and tl.bfloat16 == DTYPE:
        # The interpreter's own conversion cuts the low bits off.
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE).to(tl.float32)
