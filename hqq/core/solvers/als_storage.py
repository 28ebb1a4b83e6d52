"""From a lattice in full precision to one that its storage dtype holds: the last stage of the ALS solver.

The error that counts is that of the stored scale and zero. So the scale is rounded first, the zero is fitted again
for the rounded scale on the values that can be stored, and codes follow from both.

Least squares then leaves the values too small: with a relative error e, what is stored has 1 - e of the original's
extent along the original, and so have a layer's outputs. With the codes as they are, the scale is raised by most of
that: a layer's outputs come out at their size for a slightly larger squared error (see docs/solver.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hqq.core.solvers.columns import Layout

ZERO_FITS = 2
# Share of the lost extent that is given back; at 1 the values are unbiased, at the cost of more squared error.
EXTENT = 0.75


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
        """Return the (weighted) squared error [width] of `codes` on the lattice (scale, zero)."""
        spread = self.layout.spread
        residual = torch.sub(self.codes, spread(zero), out=self.scratch).mul_(spread(scale)).sub_(self.values)
        residual.mul_(spread(self.unit.reciprocal())).square_()
        return self._total(residual)

    def _total(self, tile: Tensor) -> Tensor:
        return self.layout.total(tile if self.weights is None else tile.mul_(self.weights))

    def best_zero(self, scale: Tensor) -> Tensor:
        """Return the zero that fits `codes` best for this scale."""
        offsets = torch.mul(self.values, self.layout.spread(-scale.reciprocal()), out=self.scratch).add_(
            self.codes
        )
        return self._total(offsets) / self.layout.length

    def extended(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Return a scale for `codes` and this zero that restores EXTENT of the lost extent, and the sum of squares."""
        spread = self.layout.spread
        values = self.values * spread(self.unit.reciprocal())
        levels = torch.sub(self.codes, spread(zero), out=self.scratch)
        along = self._total(levels * values)
        least_squares = along / self._total(levels.square_())
        squares = self._total(values.square_())
        return torch.lerp(least_squares, squares / along, EXTENT).mul_(self.unit), squares


def store(judge: Judge, fallback: Tensor, lattice: Tensor, dtype: torch.dtype, zero_mode: str) -> Tensor:
    """Return the better of two lattices as stored, and leave its codes in `judge.codes`.

    fallback, lattice: [2, width], scale and zero. The zero of `lattice` is fitted again for the stored scale, if
    `zero_mode` leaves it free: to numbers that can be stored, or to integers among them. A group takes the fallback
    where that has no larger error, or where the other has a scale or zero that cannot be used.
    """
    best = stored(fallback, dtype)
    judge.round_to(best[0], best[1])
    limit = error = judge.error(best[0], best[1])
    scale, zero = stored(lattice, dtype)
    free = zero_mode in ("float", "integer")
    for fits_left in range(ZERO_FITS if free else 0, -1, -1):
        judge.round_to(scale, zero)
        found = judge.error(scale, zero)
        better = (found < error) & _usable(scale, zero)
        best = torch.where(better, torch.stack((scale, zero)), best)
        error = torch.where(better, found, error)
        if fits_left:
            zero = judge.best_zero(scale)
            zero = stored(zero.round_() if zero_mode == "integer" else zero, dtype)
    judge.round_to(best[0], best[1])
    return _extend(judge, best, error, limit, dtype)


def _usable(scale: Tensor, zero: Tensor) -> Tensor:
    return (scale > 0) & torch.isfinite(scale.reciprocal()) & torch.isfinite(zero)


def _extend(judge: Judge, best: Tensor, error: Tensor, limit: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `best` [2, width] with larger scales where that gives back extent at the price that it should cost.

    error, limit: [width], errors of `best` and of the fallback. The scale stays where rounding it to `dtype` would
    cost more than a scale without bias does, which is where steps are fine and there is next to nothing to give back.
    """
    scale, squares = judge.extended(best[1])
    scale = stored(scale, dtype)
    found = judge.error(scale, best[1])
    price = error * squares / (squares - error)
    taken = (error < limit) & (found < limit) & (found <= price) & _usable(scale, best[1])
    return torch.stack((torch.where(taken, scale, best[0]), best[1]))
