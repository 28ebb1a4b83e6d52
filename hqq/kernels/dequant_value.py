"""What the dequantisation kernel computes for one element: its scale and zero, and `(W_q - zero) * scale`."""

# Written in Triton's language, which is not quite Python: branches on constants choose what is compiled.
# mypy: ignore-errors
# ruff: noqa: RET505

from __future__ import annotations

import triton
import triton.language as tl

from hqq.kernels.dequant_asm import FOUR_BYTES_CONSTRAINTS
from hqq.kernels.rounding import rounded

FOUR_BYTES = tl.constexpr(FOUR_BYTES_CONSTRAINTS)


@triton.jit
def load_stat(
    values,
    scale,
    zero,
    group,
    first,
    keep,
    period,
    MODE: tl.constexpr,
    SPAN: tl.constexpr,
    DTYPE: tl.constexpr,
    POLICY: tl.constexpr,
    ASM: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Scale or zero of `group`: a load, or 8-bit codes dequantised with a scale and zero of their own.

    Which of those a code has: the only one (MODE "one"), number group % period ("columns"; "runs" where the groups are
    the SPAN ones from `first` on, and `first` and `period` are multiples of SPAN), or group // period ("rows").
    """
    value = tl.load(values + group, mask=keep, eviction_policy=POLICY)
    if MODE == "plain":
        return value
    else:
        if MODE == "one":
            s, z = tl.load(scale), tl.load(zero)
        else:
            if MODE == "runs":
                outer = tl.multiple_of(first % period, SPAN) + (group - first)
            elif MODE == "columns":
                outer = group % period
            else:
                outer = group // period
            s, z = tl.load(scale + outer, mask=keep), tl.load(zero + outer, mask=keep)
        if ASM is not None:
            return tl.inline_asm_elementwise(
                ASM, FOUR_BYTES, [value, z, s], dtype=s.dtype, is_pure=True, pack=4
            )
        else:
            difference = rounded(value.to(tl.float32) - z.to(tl.float32), DTYPE, INTERPRETED)
            return rounded(difference * s.to(tl.float32), DTYPE, INTERPRETED).to(DTYPE)


@triton.jit
def load_stats(
    scale,
    zero,
    scale_scale,
    scale_zero,
    zero_scale,
    zero_zero,
    group,
    first,
    keep,
    scale_period,
    zero_period,
    SCALE_MODE: tl.constexpr,
    ZERO_MODE: tl.constexpr,
    SPAN: tl.constexpr,
    DTYPE: tl.constexpr,
    POLICY: tl.constexpr,
    ASM: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Scale and zero of `group`."""
    s = load_stat(
        scale,
        scale_scale,
        scale_zero,
        group,
        first,
        keep,
        scale_period,
        SCALE_MODE,
        SPAN,
        DTYPE,
        POLICY,
        ASM,
        INTERPRETED,
    )
    z = load_stat(
        zero,
        zero_scale,
        zero_zero,
        group,
        first,
        keep,
        zero_period,
        ZERO_MODE,
        SPAN,
        DTYPE,
        POLICY,
        ASM,
        INTERPRETED,
    )
    return s, z


@triton.jit
def field_of(
    w,
    zero,
    scale,
    FIELD: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    PACK: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    PRODUCT: tl.constexpr,
    OUT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """`(W_q - zero) * scale` of field FIELD of the packed codes `w`."""
    if ASM is not None:
        return tl.inline_asm_elementwise(
            ASM[FIELD], CONSTRAINTS, [w, zero, scale], dtype=zero.dtype, is_pure=True, pack=PACK
        )
    else:
        codes = ((w >> (BITS * (FIELDS - 1 - FIELD))) & ((1 << BITS) - 1)).to(tl.float32)
        difference = rounded(codes - zero.to(tl.float32), DIFFERENCE, INTERPRETED)
        product = rounded(difference * scale.to(tl.float32), PRODUCT, INTERPRETED)
        return rounded(product, OUT, INTERPRETED).to(OUT)
