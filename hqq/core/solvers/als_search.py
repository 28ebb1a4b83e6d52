"""The search of the ALS solver: the lattice of each group with the least squared error.

A lattice is a pair (s, b): code q stands for s * q + b. One pass rounds a group to its lattice and takes three sums
(of q, q*q and q*v); least squares on those gives the best lattice for these codes, from which the next pass starts.
Rounding and fitting each lower the error, so their alternation ends in a local minimum; the search starts from a grid
of scales and offsets, keeps the best start of each offset for two more fits, and the best of those for six more.

Steps go beyond the fitted lattice by half of what it moved: plain alternation converges slowly, the more so the
longer the groups. Every lattice is judged by the error of its own fit, so going too far costs nothing but the pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hqq.core.solvers.columns import Layout

SCALES = 6
OFFSETS = (-0.375, -0.125, 0.125, 0.375)  # of a step, about the middle of the range
FITS_PER_OFFSET = 2
FITS_OF_BEST = 6
OVERSHOOT = 1.5  # 1 goes to the fitted lattice, 2 twice as far

# Scales to start from, as fractions of the min-max step, by largest code: least and greatest for groups of 64 and for
# groups of 4096. Taken from the 2nd and 98th percentile of the best scales of normal, Laplace and Student-t groups.
_RANGES: dict[int, tuple[tuple[float, float], tuple[float, float]]] = {
    255: ((0.97, 1.01), (0.97, 1.01)),
    63: ((0.93, 1.03), (0.85, 1.01)),
    31: ((0.90, 1.05), (0.60, 1.00)),
    15: ((0.80, 1.08), (0.38, 0.85)),
    7: ((0.70, 1.02), (0.28, 0.70)),
    3: ((0.50, 0.90), (0.14, 0.50)),
    2: ((0.35, 0.75), (0.10, 0.42)),
    1: ((0.20, 0.55), (0.06, 0.28)),
}
# Both are far below what any group of values that differ comes to.
_LEAST_SCALE = 1e-3
_LEAST_SPREAD = 1e-4


class Start(NamedTuple):
    """A lattice to start from, in steps of the min-max lattice, for values centred on the middle of its codes.

    reach: how far b is moved towards the group's mean, at most.
    """

    s: float
    b: float
    reach: float = 0.0


def start_lattices(max_code: int, length: int, zero: float | None = None) -> list[list[Start]]:
    """Return SCALES lattices to start from for each of OFFSETS; with a fixed zero they differ in scale alone.

    In long groups the middle of the range is far from the middle of the values, and fits move an offset slowly. There
    a lattice that is narrower than the range starts as near to the mean as it can without leaving the range.
    """
    short, long = _RANGES[max_code]
    share = min(max((math.log2(length) - 6) / 6, 0.0), 1.0)
    low, high = (a ** (1 - share) * b**share for a, b in zip(short, long, strict=True))
    count = SCALES if zero is None else SCALES * len(OFFSETS)
    scales = [low * (high / low) ** (i / (count - 1)) for i in range(count)]
    half = max_code / 2
    if zero is None:
        reach = {s: share * max(1 - s, 0.0) * half for s in scales}
        return [[Start(s, (offset - half) * s, reach[s]) for s in scales] for offset in OFFSETS]
    lattices = [Start(s, (1 - s) * zero - half) for s in scales]
    return [lattices[k :: len(OFFSETS)] for k in range(len(OFFSETS))]


class Sums:
    """Sums of q, q*q and q*v over each group for `count` lattices: three tensors [count, width], and their rows."""

    def __init__(self, like: Tensor, count: int) -> None:
        self.q, self.qq, self.qv = (like.new_empty((count, like.shape[-1])) for _ in range(3))
        self.rows = list(zip(self.q.unbind(0), self.qq.unbind(0), self.qv.unbind(0), strict=True))


class Columns:
    """A tile of groups in steps of their min-max lattice, with what does not change from pass to pass.

    values: float32 [rows, columns], centred on the middle of each group's range. weights: the same shape, mean 1 in
    every group, or None. codes, product: scratch space of the same shape.
    """

    def __init__(
        self,
        layout: Layout,
        max_code: int,
        values: Tensor,
        weights: Tensor | None,
        codes: Tensor,
        product: Tensor,
    ) -> None:
        self.layout, self.max_code = layout, max_code
        self.values, self.weights, self.codes, self.product = values, weights, codes, product
        weighted = values if weights is None else torch.mul(values, weights, out=product)
        self.sum = layout.total(weighted)
        self.count = float(layout.length)
        self.mean = self.sum / self.count

    def round_to_start(self, start: Start) -> None:
        """Set `codes` to those nearest on a lattice that all groups share, but for where it is moved to."""
        b: Tensor | float = start.b
        if start.reach:
            b = self.layout.spread(self.mean.clamp(-start.reach, start.reach).add_(b))
        offset = b * (-1 / start.s) if isinstance(b, Tensor) else torch.tensor(-b / start.s, device="cpu")
        torch.add(offset, self.values, alpha=1 / start.s, out=self.codes).round_().clamp_(0, self.max_code)

    def round_to(self, s: Tensor, b: Tensor) -> None:
        """Set `codes` to those nearest on each group's lattice; s, b: [width]."""
        spread = self.layout.spread
        inverse = s.reciprocal()
        offset = (inverse * b).neg_()
        torch.addcmul(spread(offset), self.values, spread(inverse), out=self.codes).round_().clamp_(
            0, self.max_code
        )

    def add_up(self, row: tuple[Tensor, Tensor, Tensor]) -> None:
        """Write the (weighted) sums of q, q*q and q*v to a row of `Sums`; uses up `codes`."""
        q, t, into = self.codes, self.product, self.layout.total_into
        if self.weights is None:
            into(q, row[0])
            into(torch.mul(q, q, out=t), row[1])
            into(torch.mul(q, self.values, out=t), row[2])
        else:
            into(torch.mul(q, self.weights, out=t), row[0])
            into(q.mul_(t), row[1])
            into(t.mul_(self.values), row[2])


# Takes sums; returns [3, count, width]: gain (what the fit takes off the squared error, up to a constant of the
# group), s and b.
Fit = Callable[[Sums], Tensor]


def free_fit(columns: Columns) -> Fit:
    """Return the least-squares fit of both s and b."""
    share = 1.0 / columns.count

    def fit(sums: Sums) -> Tensor:
        fitted = sums.q.new_empty((3, *sums.q.shape))
        gain, s, b = fitted.unbind(0)
        mean = sums.q * share
        # Codes that are all alike have no spread, and tell nothing of the scale.
        spread = torch.addcmul(sums.qq, mean, sums.q, value=-1).clamp_min_(_LEAST_SPREAD)
        covariance = torch.addcmul(sums.qv, mean, columns.sum, value=-1)
        torch.div(covariance, spread, out=s).clamp_min_(_LEAST_SCALE)
        torch.mul(covariance, s, out=gain)
        torch.addcmul(columns.mean, s, mean, value=-1, out=b)
        return fitted

    return fit


def zero_fit(columns: Columns, middle: Tensor, zero: float | None) -> Fit:
    """Return the fit of s for a given zero (a number), or for the integer nearest to the best one (None).

    middle: [width], what was subtracted from the values, in steps.
    """
    count = columns.count
    free = free_fit(columns)

    def fit(sums: Sums) -> Tensor:
        fitted = free(sums)
        gain, s, b = fitted.unbind(0)
        z = torch.full_like(s, zero) if zero is not None else zero_of(s, b, middle).round_()
        # Regress the values as they were before they were centred on q - z.
        along = sums.qv + middle * sums.q - z * (columns.sum + count * middle)
        spread = (sums.qq - 2 * z * sums.q + count * z * z).clamp_min_(_LEAST_SPREAD)
        torch.div(along, spread, out=s).clamp_min_(_LEAST_SCALE)
        torch.mul(along, s, out=gain)
        torch.addcmul(-middle, s, z, value=-1, out=b)
        return fitted

    return fit


def zero_of(s: Tensor, b: Tensor, middle: Tensor) -> Tensor:
    """Return the zero of the lattice (s, b) of values centred by `middle`, all in steps of the min-max lattice."""
    return (b + middle).div_(s).neg_()


def search(columns: Columns, starts: Sequence[Sequence[Start]], fit: Fit) -> tuple[Tensor, Tensor]:
    """Return the best lattice (s, b) of each group, each [width]; starts: see `start_lattices`."""
    best = _best_starts(columns, starts, fit)
    best = _descend(columns, best, fit, FITS_PER_OFFSET)
    first, *others = torch.split(best, 1, 1)
    for other in others:
        first = torch.where(other[0] > first[0], other, first)
    _, s, b = _descend(columns, first, fit, FITS_OF_BEST)
    return s[0], b[0]


def _best_starts(columns: Columns, starts: Sequence[Sequence[Start]], fit: Fit) -> Tensor:
    """Return gain, s and b [3, count, width] of the best first fit in each of `count` lists of starts."""
    sums = Sums(columns.sum, len(starts))
    best: Tensor | None = None
    for lattices in zip(*starts, strict=True):
        for start, row in zip(lattices, sums.rows, strict=True):
            columns.round_to_start(start)
            columns.add_up(row)
        fitted = fit(sums)
        best = fitted if best is None else torch.where(fitted[0] > best[0], fitted, best)
    assert best is not None
    return best


def _descend(columns: Columns, best: Tensor, fit: Fit, fits: int) -> Tensor:
    """Return the best of `best` [3, count, width] and what `fits` further fits lead to."""
    sums = Sums(columns.sum, best.shape[1])
    s, b = best[1], best[2]
    for _ in range(fits):
        for s_row, b_row, row in zip(s.unbind(0), b.unbind(0), sums.rows, strict=True):
            columns.round_to(s_row, b_row)
            columns.add_up(row)
        fitted = fit(sums)
        gain, s_fit, b_fit = fitted.unbind(0)
        best = torch.where(gain > best[0], fitted, best)
        s = torch.lerp(s, s_fit, OVERSHOOT).clamp_min_(_LEAST_SCALE)
        b = torch.lerp(b, b_fit, OVERSHOOT)
    return best
