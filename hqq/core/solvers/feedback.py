"""Error feedback: codes of a weight for the inputs that it sees, column by column.

With H = sum of x x^T over the layer's inputs, the error of the outputs is tr(E H E^T), E = W - quantised. Columns are
rounded one after the other; what a column's rounding costs is made up for by the columns that are still to come
(Frantar et al. 2022, "GPTQ"; Hassibi & Stork 1993). The format stays what it is: each group has one scale and zero,
found by the same group solver, but on the values that the columns before have left, and weighted by what an error in
each column costs once the later ones have done what they can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hqq.core.qtensor import QSpec
from hqq.core.solvers.base import Solution
from hqq.core.solvers.feedback_lattices import ColumnGroups, FixedLattice, Lattices, RowGroups
from hqq.core.solvers.feedback_round import round_columns

# Solves groups that are columns of a matrix [gs, G]; the second argument weighs the rows, [gs], or is None.
SolveGroups = Callable[[Tensor, Tensor | None], Solution]

_BLOCK = 128  # columns whose errors reach the rest of the weight in one product
_CHUNK = 64  # columns that are rounded before the rest of their block hears of it
_ATTEMPTS = 3


class Factor(NamedTuple):
    """U, upper triangular float32 [K, K], with U^T U = (H + damping · mean diagonal)^-1, and the damping it took."""

    U: Tensor
    damping: float


def factorise(H: Tensor, damping: float = 0.01) -> Factor | None:
    """Return the factor of the inverse of `H` [K, K] (float32, symmetric), or None if there is none.

    damping: share of H's mean diagonal that is added to it. Single precision is tried first, then double, then ten and
    a hundred times the damping. None for a matrix of zeros, and for one that is still not positive definite.
    """
    mean = float(H.diagonal().mean())
    if not 0 < mean < float("inf"):
        return None
    for attempt in range(_ATTEMPTS):
        share = damping * 10**attempt
        for dtype in (torch.float32, torch.float64):
            # In reverse order: with J the reversal and J H J = L L^T, the inverse of J L J is U itself.
            reversed_H = H.to(dtype).flip(0, 1)
            reversed_H.diagonal().add_(share * mean)
            L, info = torch.linalg.cholesky_ex(reversed_H)
            if int(info):
                continue
            identity = torch.eye(len(H), dtype=dtype, device=H.device)
            U = torch.linalg.solve_triangular(L, identity, upper=False).flip(0, 1).float()
            if bool(torch.isfinite(U).all()):
                return Factor(U, share)
    return None


def corrected(W: Tensor, cross: Tensor, U: Tensor, share: float) -> Tensor:
    """Return `W` moved so that it makes up for `share` of the error in its inputs, float32 [N, K].

    cross: sum of (x - x~) x~^T over inputs x of the full model and x~ of the quantised one, [K, K]. At a share of 1
    this is the least-squares solution of W' x~ = W x with the damping that `U` has.
    """
    W = W.float()
    return torch.addmm(W, (W @ cross) @ U.t(), U, alpha=share)


def output_error(difference: Tensor, H: Tensor) -> float:
    """Return tr(E H E^T) for E = `difference` [N, K]: the squared error of the outputs over all inputs."""
    return float(((difference @ H) * difference).sum(dtype=torch.float64))


def solve_with_feedback(
    W: Tensor, U: Tensor, spec: QSpec, solve: SolveGroups, fixed: tuple[Tensor, Tensor] | None = None
) -> Solution:
    """Return codes, scale and zero of `W` for inputs with the factor `U` (see `factorise`).

    Args:
        W: float [N, K]; not changed.
        U: float32 [K, K] on W's device.
        spec: bits and grouping.
        solve: the group solver.
        fixed: scale and zero as they are stored, of the spec's `stat_shape`; only codes are then searched for. None:
            they are found with the codes, which takes groups within rows (axis 1) or within columns (axis 0).

    Codes are the grouped matrix, float32. Raises what `solve` raises.
    """
    columns = W.detach().t().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    lattices = _lattices(spec, U, solve, fixed)
    codes = torch.empty_like(columns)
    for begin, end in _blocks(len(columns), lattices.unit):
        errors = columns.new_empty((end - begin, columns.shape[1]))
        for first, last in _chunks(begin, end, lattices.unit):
            scale, zero = lattices.at(first, last, columns)
            error = errors[first - begin : last - begin]
            round_columns(
                columns[first:last],
                U[first:last, first:last],
                scale,
                zero,
                spec.max_code,
                codes[first:last],
                error,
            )
            columns[last:end].addmm_(U[first:last, last:end].t(), error, alpha=-1)
        columns[end:].addmm_(U[begin:end, end:].t(), errors, alpha=-1)
    scale, zero = lattices.stats()
    return Solution(spec.grouping.group(codes.t()), scale, zero)


def can_follow(spec: QSpec) -> bool:
    """Whether scale and zero can be found column by column: no group has parts of several rows (or of all)."""
    if not spec.channel_wise or len(spec.shape) != 2:
        return False
    N, K = spec.shape
    return (K if spec.axis == 1 else N) % spec.grouping.length == 0


def _lattices(spec: QSpec, U: Tensor, solve: SolveGroups, fixed: tuple[Tensor, Tensor] | None) -> Lattices:
    if fixed is not None:
        return FixedLattice(spec, *fixed)
    if spec.axis == 0:
        return ColumnGroups(spec, solve)
    # 1 / diagonal^2 is what is left of the variance of an input once the later ones have explained what they can.
    return RowGroups(spec, solve, U.diagonal().square().reciprocal())


def _blocks(K: int, unit: int) -> Iterator[tuple[int, int]]:
    """Yield blocks of up to 128 columns that begin wherever a longer unit does, and contain shorter ones whole."""
    step = unit * (_BLOCK // unit) if unit <= _BLOCK else unit
    for start in range(0, K, step):
        stop = min(start + step, K)
        for begin in range(start, stop, _BLOCK):
            yield begin, min(begin + _BLOCK, stop)


def _chunks(begin: int, end: int, unit: int) -> Iterator[tuple[int, int]]:
    for group in range(begin, end, unit):
        stop = min(group + unit, end)
        for first in range(group, stop, _CHUNK):
            yield first, min(first + _CHUNK, stop)
