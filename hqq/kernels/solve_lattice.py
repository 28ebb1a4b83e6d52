"""The min-max lattice of a block of groups, in a kernel: what `hqq.core.solvers.min_max.min_max_lattice` computes.

The same operations in the same order and precision, so that codes of groups whose lattice does not move come out
equal.
"""

# Written in Triton's language, which is not quite Python: branches on constants choose what is compiled.
# mypy: ignore-errors
# ruff: noqa: SIM300

from __future__ import annotations

import triton
import triton.language as tl

_SMALLEST_STEP = tl.constexpr(2.0**-120)
_LARGEST_STEP = tl.constexpr(2.0**127)
_FLOAT16_SPACING = tl.constexpr(2.0**-24)
_FLOAT16_TINY = tl.constexpr(2.0**-14)
_FLOAT32_TINY = tl.constexpr(2.0**-126)
_UNITS_FROM = tl.constexpr(2.0**23)  # floats from there on are integers
_MAGIC64 = tl.constexpr(1.5 * 2.0**52)


@triton.jit
def rint(x):
    """`x` rounded to an integer, ties to even."""
    size = tl.abs(x)
    rounded = (size + _UNITS_FROM) - _UNITS_FROM
    return tl.where(size < _UNITS_FROM, tl.where(x < 0.0, -rounded, rounded), x)


@triton.jit
def min_max(low, high, MAX_CODE: tl.constexpr, STORAGE: tl.constexpr, ROUND_ZERO: tl.constexpr):
    """(inverse scale, scale, zero) of groups that reach from `low` to `high`, one number each."""
    span = high - low
    # A group of one value has no step: that of 1 here is replaced below.
    inverse = tl.div_rn(tl.full(span.shape, 1.0, tl.float32), tl.where(span == 0.0, 1.0, span)) * MAX_CODE
    scale = tl.div_rn(tl.full(span.shape, 1.0, tl.float32), inverse)
    zero = -low * inverse
    magnitude = tl.maximum(tl.abs(low), tl.abs(high))
    resolution = magnitude * (2.0**-22 if STORAGE == tl.float32 else 2.0**-11)
    smallest = _FLOAT16_TINY if STORAGE == tl.float16 else _SMALLEST_STEP
    step = tl.div_rn(span, tl.full(span.shape, MAX_CODE, tl.float32))
    # Not "span is infinite": a span that is NaN is unusual too.
    unusual = (step < tl.maximum(resolution, smallest)) | ((span < float("inf")) == 0)
    if tl.max(unusual.to(tl.int32), 0) > 0:
        i, s, z = _unusual(low, high, resolution, MAX_CODE, STORAGE)
        inverse = tl.where(unusual, i, inverse)
        scale = tl.where(unusual, s, scale)
        zero = tl.where(unusual, z, zero)
    if ROUND_ZERO:
        zero = rint(zero)
    return inverse, scale, zero


@triton.jit
def _unusual(low, high, resolution, MAX_CODE: tl.constexpr, STORAGE: tl.constexpr):
    """The same for constant, offset-dominated, tiny or huge groups, in double precision."""
    # The next power of two, by the bits of a float.
    bits = tl.maximum(resolution, _SMALLEST_STEP).to(tl.int32, bitcast=True)
    offset_step = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True).to(tl.float64)
    constant = high == low
    low, high = low.to(tl.float64), high.to(tl.float64)
    step = (high - low) / MAX_CODE
    dominated = step < resolution.to(tl.float64)
    plain = tl.maximum(step, _SMALLEST_STEP)
    if STORAGE == tl.float16:
        offset_step = tl.maximum(offset_step, _FLOAT16_SPACING)
        plain = tl.where(step < _FLOAT16_TINY, tl.ceil(step / _FLOAT16_SPACING) * _FLOAT16_SPACING, step)
    step = tl.minimum(tl.where(dominated, offset_step, plain), _LARGEST_STEP)
    # A group of one value may have no step at all here; it gets its own below.
    step = tl.where(constant, 1.0, step)
    zero = -low / step
    zero = tl.where(dominated, (zero + _MAGIC64) - _MAGIC64, zero)
    magnitude = tl.abs(low)
    nothing = magnitude < _FLOAT32_TINY
    step = tl.where(constant & (nothing == 0), magnitude, step)
    unit = tl.where(nothing, 0.0, tl.where(low < 0.0, 1.0, -1.0))
    zero = tl.where(constant, unit, zero)
    return (1.0 / step).to(tl.float32), step.to(tl.float32), zero.to(tl.float32)
