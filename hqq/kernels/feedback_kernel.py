"""The kernel behind `hqq.kernels.feedback`."""

# Written in Triton's language, which is not quite Python.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

# Adding and subtracting 1.5 * 2^23 rounds numbers below 2^22 to the nearest integer, ties to even.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def feedback_kernel(
    columns_ptr,
    U_ptr,
    scale_ptr,
    zero_ptr,
    codes_ptr,
    errors_ptr,
    count,
    N,
    scale_stride,
    zero_stride,
    MAX_CODE: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows of the weight, all their `count` <= C columns in registers.

    All matrices are row-major [count, N] but for U [count, count].
    """
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = n < N
    c = tl.arange(0, C)
    offsets = c[:, None].to(tl.int64) * N + n[None, :]
    mask = (c < count)[:, None] & inside[None, :]
    w = tl.load(columns_ptr + offsets, mask=mask, other=0.0)
    for k in range(count):
        column = tl.sum(tl.where(c[:, None] == k, w, 0.0), 0)
        scale = tl.load(scale_ptr + k * scale_stride + n, mask=inside, other=1.0)
        zero = tl.load(zero_ptr + k * zero_stride + n, mask=inside, other=0.0)
        position = tl.minimum(tl.maximum(column * (1.0 / scale) + zero, 0.0), MAX_CODE)
        code = (position + _ROUNDER) - _ROUNDER
        # U's row k: the diagonal, and what the later columns take of the error.
        row = tl.load(U_ptr + k * count + c, mask=(c < count) & (c >= k), other=0.0)
        diagonal = tl.sum(tl.where(c == k, row, 0.0), 0)
        error = (column - (code - zero) * scale) / diagonal
        k_row = k * N + n
        tl.store(codes_ptr + k_row, code, mask=inside)
        tl.store(errors_ptr + k_row, error, mask=inside)
        w -= row[:, None] * error[None, :]
