"""The min-max lattice of a group: the start of every solver, and a solver of its own (round to nearest)."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from hqq.core.solvers.base import Solution
from hqq.errors import WeightError

# Steps beyond these have no finite reciprocal, or no finite product with a code, in float32.
_SMALLEST_STEP = 2.0**-120
_LARGEST_STEP = 2.0**127
_FLOAT16_SPACING = 2.0**-24  # of the numbers below float16's smallest normal one


class Lattice(NamedTuple):
    """`codes = round(W * inverse_scale + zero)`, `W_r = (codes - zero) * scale`.

    float32, W's shape with the group's dimension 1.
    """

    inverse_scale: Tensor
    scale: Tensor
    zero: Tensor


def min_max_lattice(
    W: Tensor,
    dim: int | None,
    max_code: int,
    *,
    round_zero: bool = False,
    storage_dtype: torch.dtype = torch.float32,
) -> Lattice:
    """Return the lattice that spans each group of `W` from its minimum (code 0) to its maximum (`max_code`).

    A step that `storage_dtype` cannot hold at full precision is rounded up to one that it can, groups whose offset
    dwarfs their range get a step no finer than the dtype resolves at the offset, and groups of one value c get step
    |c| and zero -sign(c), which reproduce c exactly. Raises WeightError if W is not finite.
    """
    low, high = (W.min(), W.max()) if dim is None else (W.amin(dim, keepdim=True), W.amax(dim, keepdim=True))
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        refuse_infinite()
    span = high - low
    inverse_scale = max_code / span
    lattice = Lattice(inverse_scale, 1.0 / inverse_scale, -low * inverse_scale)
    step = span / max_code
    smallest = torch.finfo(torch.float16).tiny if storage_dtype == torch.float16 else _SMALLEST_STEP
    offset = _resolution_at_offset(low, high, storage_dtype)
    unusual = (step < offset.clamp_min(smallest)) | ~torch.isfinite(span)
    if bool(unusual.any()):
        repaired = _unusual_lattice(low.double(), high.double(), max_code, offset.double(), storage_dtype)
        lattice = Lattice(
            *(torch.where(unusual, new, old) for new, old in zip(repaired, lattice, strict=True))
        )
    return lattice._replace(zero=torch.round(lattice.zero)) if round_zero else lattice


def refuse_infinite() -> NoReturn:
    """Raise the WeightError for a weight that is not finite."""
    raise WeightError(
        "got a weight with NaN or infinite values; expected finite values. Check the checkpoint it came from, "
        "and overflow in an earlier cast to float16"
    )


def _resolution_at_offset(low: Tensor, high: Tensor, storage_dtype: torch.dtype) -> Tensor:
    """Return the spacing of values as large as the group's largest: steps below it only cost zero's precision."""
    half = storage_dtype in (torch.float16, torch.bfloat16)
    return torch.maximum(low.abs(), high.abs()) * (2.0**-11 if half else 2.0**-22)


def _unusual_lattice(
    low: Tensor, high: Tensor, max_code: int, offset: Tensor, storage_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (inverse_scale, scale, zero) for constant, offset-dominated, tiny or huge groups.

    Takes float64, in which the span of any two float32 numbers is finite.
    """
    step = (high - low) / max_code
    # A power of two and a zero of few bits: both exact in every storage dtype.
    offset_step = torch.exp2(torch.ceil(torch.log2(offset.clamp_min(_SMALLEST_STEP))))
    plain_step = step.clamp_min(_SMALLEST_STEP)
    if storage_dtype == torch.float16:
        offset_step = offset_step.clamp_min(_FLOAT16_SPACING)
        below_normal = step < torch.finfo(torch.float16).tiny
        plain_step = torch.where(below_normal, torch.ceil(step / _FLOAT16_SPACING) * _FLOAT16_SPACING, step)
    dominated = step < offset
    step = torch.where(dominated, offset_step, plain_step).clamp_max(_LARGEST_STEP)
    zero = torch.where(dominated, torch.round(-low / step), -low / step)
    magnitude = low.abs()
    constant = high == low
    nothing = magnitude < torch.finfo(torch.float32).tiny
    step = torch.where(constant, torch.where(nothing, torch.ones_like(step), magnitude), step)
    zero = torch.where(constant, torch.where(nothing, torch.zeros_like(zero), -torch.sign(low)), zero)
    return (1.0 / step).float(), step.float(), zero.float()


def nearest_codes(W: Tensor, lattice: Lattice, max_code: int) -> Tensor:
    """Return the codes nearest to `W` on the lattice, float32 of W's shape."""
    # Product and sum are rounded one after the other: a fused multiply-add would break ties differently.
    return (W * lattice.inverse_scale).add_(lattice.zero).round_().clamp_(0, max_code)


def solve_min_max(
    W: Tensor,
    dim: int | None,
    max_code: int,
    *,
    round_zero: bool = False,
    storage_dtype: torch.dtype = torch.float32,
) -> Solution:
    """Round every value to the nearest point of its group's min-max lattice (a `GroupSolver`)."""
    lattice = min_max_lattice(W, dim, max_code, round_zero=round_zero, storage_dtype=storage_dtype)
    return Solution(nearest_codes(W, lattice, max_code), lattice.scale, lattice.zero)


def span_about(W: Tensor, dim: int, zero: float, max_code: int) -> Tensor:
    """Return the smallest scale of each group [G] at which no value lies outside the codes 0 … `max_code` for `zero`.

    At most half a step may lie outside where `zero` is the first or last code; 1 for groups of zeros.
    """
    above, below = max(max_code - zero, 0.5), max(zero, 0.5)
    scale = torch.maximum(W.amax(dim) / above, W.amin(dim) / -below)
    return torch.where(scale >= _SMALLEST_STEP, scale, torch.ones_like(scale))
