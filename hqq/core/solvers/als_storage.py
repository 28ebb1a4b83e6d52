"""From a lattice in full precision to one that its storage dtype holds: the last stage of the ALS solver.

The error that counts is that of the stored scale and zero. So the scale is rounded first, the zero is fitted again
for the rounded scale, step by step on the values that can be stored, and the codes come last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hqq.core.solvers.columns import Layout

ZERO_FITS = 2


def stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 `values` rounded to `dtype`, as float32; those that overflow there are left as they are."""
    if dtype.itemsize >= values.dtype.itemsize:
        return values
    rounded = values.to(dtype).to(values.dtype)
    return torch.where(torch.isfinite(rounded), rounded, values)


@dataclass
class Judge:
    """A tile and what it takes to tell the error of each group on a lattice.

    values: the tile as it is, float32 [rows, columns]. unit: [width], errors are in squares of it. codes, scratch: of
    the shape of values.
    """

    layout: Layout
    max_code: int
    values: Tensor
    unit: Tensor
    weights: Tensor | None
    codes: Tensor
    scratch: Tensor

    def round_to(self, scale: Tensor, zero: Tensor) -> None:
        """Set `codes` to those nearest on the lattice (scale, zero), each [width]."""
        spread = self.layout.spread
        torch.mul(self.values, spread(scale.reciprocal()), out=self.codes)
        self.codes.add_(spread(zero)).round_().clamp_(0, self.max_code)

    def error(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the (weighted) squared error [width] of the codes, which are set to the nearest."""
        self.round_to(scale, zero)
        spread = self.layout.spread
        residual = torch.sub(self.codes, spread(zero), out=self.scratch).mul_(spread(scale)).sub_(self.values)
        residual.mul_(spread(self.unit.reciprocal())).square_()
        if self.weights is not None:
            residual.mul_(self.weights)
        return self.layout.total(residual)

    def best_zero(self, scale: Tensor) -> Tensor:
        """Return the zero that fits the codes of the last lattice best, for the same scale."""
        offsets = torch.mul(self.values, self.layout.spread(-scale.reciprocal()), out=self.scratch).add_(
            self.codes
        )
        if self.weights is not None:
            offsets.mul_(self.weights)
        return self.layout.total(offsets) / self.layout.length


def store(judge: Judge, fallback: Tensor, lattice: Tensor, dtype: torch.dtype, zero_mode: str) -> Tensor:
    """Return the better of two lattices as stored, and leave its codes in `judge.codes`.

    fallback, lattice: [2, width], scale and zero. The zero of `lattice` is fitted again for the stored scale, if
    `zero_mode` leaves it free: to numbers that can be stored, or to integers among them. A group takes the fallback
    where that has no larger error, or where the other has a scale or zero that cannot be used.
    """
    best = stored(fallback, dtype)
    error = judge.error(best[0], best[1])
    scale, zero = stored(lattice, dtype)
    free = zero_mode in ("float", "integer")
    for fits_left in range(ZERO_FITS if free else 0, -1, -1):
        found = judge.error(scale, zero)
        usable = (scale > 0) & torch.isfinite(scale.reciprocal()) & torch.isfinite(zero)
        better = (found < error) & usable
        best = torch.where(better, torch.stack((scale, zero)), best)
        error = torch.where(better, found, error)
        if fits_left:
            zero = judge.best_zero(scale)
            zero = stored(zero.round_() if zero_mode == "integer" else zero, dtype)
    judge.round_to(best[0], best[1])
    return best
