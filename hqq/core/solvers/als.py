"""The default solver: scale and zero of each group by a grid of alternating least squares, for the numbers as stored.

The half-quadratic solver moves only the zero. What counts more is to let the scale shrink as well, to start from
several clipped ranges, and to keep each group's best. See docs/solver.md for the study and for what was tried.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from hqq.core.solvers.als_search import Columns, free_fit, search, start_lattices, zero_fit, zero_of
from hqq.core.solvers.als_storage import Judge, store
from hqq.core.solvers.base import Solution
from hqq.core.solvers.columns import plan
from hqq.core.solvers.min_max import min_max_lattice, solve_min_max, span_about
from hqq.errors import ConfigError, ShapeError, WeightError

ZERO_MODES = ("float", "integer", "middle", "signed")


def fixed_zero(zero_mode: str, max_code: int) -> float | None:
    """Return the zero that `zero_mode` fixes for all groups, or None."""
    return {"middle": max_code / 2, "signed": float((max_code + 1) // 2)}.get(zero_mode)


def solve_als(
    W: Tensor,
    dim: int | None,
    max_code: int,
    *,
    round_zero: bool = False,
    storage_dtype: torch.dtype = torch.float32,
    zero_mode: str = "float",
    importance: Tensor | None = None,
) -> Solution:
    """Solve all groups of `W` (a `GroupSolver`); no group's squared error, as stored, exceeds that of min-max rounding.

    Args:
        round_zero: has no effect: the zero is searched for as `zero_mode` says.
        zero_mode: "float"; "integer" searches integer zeros; the other two search the scale alone, with the zero at
            max_code / 2 ("middle") or at (max_code + 1) / 2, rounded down ("signed": codes are shifted integers).
        importance: weight of each element's squared error, [R, C], finite and not negative.

    scale and zero of the solution are float32 numbers that `storage_dtype` holds exactly.
    """
    if zero_mode not in ZERO_MODES:
        raise ConfigError(f"got zero_mode={zero_mode!r}; expected one of {', '.join(ZERO_MODES)}")
    if importance is not None:
        _check_importance(importance, W)
    if dim is None:
        return solve_min_max(W, dim, max_code, round_zero=round_zero, storage_dtype=storage_dtype)
    job = _Job(W, dim, max_code, storage_dtype, zero_mode, importance)
    # Threads are left to torch's operations: those are so short that Python threads would wait for each other.
    job.run(list(job.layout.blocks()))
    return job.solution()


def _check_importance(importance: Tensor, W: Tensor) -> None:
    if importance.shape != W.shape:
        raise ShapeError(
            f"got importance of shape {tuple(importance.shape)}; expected that of W, {tuple(W.shape)}"
        )
    if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise WeightError(
            "got importance with negative, NaN or infinite values; expected finite values of at least 0"
        )


class _Job:
    """One call of the solver: what all blocks read, and where each writes its groups."""

    def __init__(
        self,
        W: Tensor,
        dim: int,
        max_code: int,
        storage_dtype: torch.dtype,
        zero_mode: str,
        importance: Tensor | None,
    ) -> None:
        self.dim, self.max_code, self.storage_dtype = dim, max_code, storage_dtype
        self.zero_mode, self.zero = zero_mode, fixed_zero(zero_mode, max_code)
        self.groups = self._by_group(W)
        self.importance = None if importance is None else self._by_group(importance)
        self.layout = plan(self.groups.shape[0], self.groups.shape[1], W.device)
        self.starts = start_lattices(max_code, self.layout.length, self.zero)
        self.codes = torch.empty_like(W, memory_format=torch.contiguous_format)
        self.lattice = W.new_empty((2, self.layout.groups))

    def solution(self) -> Solution:
        """Return what all blocks wrote."""
        scale, zero = self.lattice.unsqueeze(1 + self.dim)
        return Solution(self.codes, scale, zero)

    def _by_group(self, matrix: Tensor) -> Tensor:
        return matrix if self.dim == 1 else matrix.t()

    def _min_max(self, groups: Tensor) -> Tensor:
        """Return scale and zero [2, g] of the lattices that span `groups` [g, length] and that the mode allows."""
        if self.zero is None:
            integer = self.zero_mode == "integer"
            found = min_max_lattice(
                groups, 1, self.max_code, round_zero=integer, storage_dtype=self.storage_dtype
            )
            return torch.stack((found.scale.flatten(), found.zero.flatten()))
        scale = span_about(groups, 1, self.zero, self.max_code)
        return torch.stack((scale, torch.full_like(scale, self.zero)))

    @torch.no_grad()
    def run(self, blocks: Sequence[slice]) -> None:
        """Solve the groups of `blocks`."""
        shape = (self.layout.rows, self.layout.columns)
        tiles = [self.groups.new_empty(shape) for _ in range(4)]
        weights = self.groups.new_empty(shape) if self.importance is not None or self.layout.padded else None
        for block in blocks:
            self._solve_block(block, tiles, weights)

    def _solve_block(self, block: slice, tiles: list[Tensor], weights: Tensor | None) -> None:
        layout, max_code = self.layout, self.max_code
        values, centred, codes, scratch = tiles
        layout.tile(self.groups[block], values)
        if weights is not None:
            layout.tile(self._weights(block), weights)
        missing = layout.width - (block.stop - block.start)
        # Tile by tile like everything else: on whole weights torch would wake its threads for a few operations.
        fallback = pad(self._min_max(self.groups[block]), (0, missing), value=1.0)
        unit, middle = fallback[0], max_code / 2 - fallback[1]
        torch.sub(values, layout.spread(middle * unit), out=centred).mul_(layout.spread(unit.reciprocal()))
        columns = Columns(layout, max_code, centred, weights, codes, scratch)
        fit = free_fit(columns) if self.zero_mode == "float" else zero_fit(columns, middle, self.zero)
        s, b = search(columns, self.starts, fit)
        judge = Judge(layout, max_code, values, unit, weights, codes, scratch)
        zero = zero_of(s, b, middle) if self.zero is None else torch.full_like(s, self.zero)
        lattice = torch.stack((s * unit, zero.round_() if self.zero_mode == "integer" else zero))
        best = store(judge, fallback, lattice, self.storage_dtype, self.zero_mode)
        self.lattice[:, block] = best[:, : block.stop - block.start]
        layout.untile(judge.codes, self._by_group(self.codes)[block])

    def _weights(self, block: slice) -> Tensor:
        """Return the weights of the groups in `block`, of mean 1 in each group."""
        if self.importance is None:
            return torch.ones_like(self.groups[block])
        weights = self.importance[block].float()
        weights = weights / weights.amax(1, keepdim=True)
        weights = weights / weights.mean(1, keepdim=True)
        # A group without any weight has no better and no worse: it is solved as if its elements weighed the same.
        return weights.nan_to_num_(nan=1.0)
