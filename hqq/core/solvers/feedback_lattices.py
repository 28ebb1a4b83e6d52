"""Where error feedback gets scale and zero of the columns that are next: found as it goes along, or given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from hqq.core.qtensor import QSpec
from hqq.core.solvers.base import Solution

# Columns whose groups are solved at once for axis 0. A group lies within a column there, and could be solved when its
# column is reached; fewer columns at once were no better.
_COLUMNS_AT_ONCE = 32
_FIXED_UNIT = 64


class Lattices(Protocol):
    """Gives scale and zero of columns; `unit` columns at a time are asked for without their errors in between."""

    unit: int

    def at(self, first: int, last: int, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero of columns first … last, [last - first, N] or [1, N].

        columns: float32 [K, N], the weight transposed, as the rounding of all columns before `first` has left it.
        """
        ...

    def stats(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero of all groups, of the spec's `stat_shape`."""
        ...


class RowGroups:
    """axis 1: a group is `gs` neighbouring columns of one row, solved when its first column is reached.

    importance: [K], the weight of an error in each column.
    """

    def __init__(
        self, spec: QSpec, solve: Callable[[Tensor, Tensor | None], Solution], importance: Tensor
    ) -> None:
        self.unit = spec.grouping.length
        self._spec, self._solve, self._importance = spec, solve, importance
        self._found: list[Solution] = []

    def at(self, first: int, last: int, columns: Tensor) -> tuple[Tensor, Tensor]:
        index = first // self.unit
        if index == len(self._found):
            rows = slice(first, first + self.unit)
            found = self._solve(columns[rows], self._importance[rows])
            # Without the codes: they are those of values that the feedback has yet to change.
            self._found.append(found._replace(codes=found.scale))
        return self._found[index].scale, self._found[index].zero

    def stats(self) -> tuple[Tensor, Tensor]:
        shape = self._spec.grouping.stat_shape
        scales, zeros = (torch.cat(list(part)) for part in list(zip(*self._found, strict=True))[1:])
        return scales.t().reshape(shape), zeros.t().reshape(shape)


class ColumnGroups:
    """axis 0: a group is every R-th element of one column, R = N / gs."""

    def __init__(self, spec: QSpec, solve: Callable[[Tensor, Tensor | None], Solution]) -> None:
        self.unit = _COLUMNS_AT_ONCE
        self._spec, self._solve = spec, solve
        self._found: list[tuple[Tensor, Tensor]] = []

    def at(self, first: int, last: int, columns: Tensor) -> tuple[Tensor, Tensor]:
        count, length = last - first, self._spec.grouping.length
        values = columns[first:last].view(count, length, -1).permute(1, 0, 2)
        found = self._solve(values.reshape(length, -1), None)
        scale, zero = found.scale.view(count, -1), found.zero.view(count, -1)
        self._found.append((scale, zero))
        return scale.repeat(1, length), zero.repeat(1, length)

    def stats(self) -> tuple[Tensor, Tensor]:
        shape = self._spec.grouping.stat_shape
        scales, zeros = (torch.cat(part) for part in zip(*self._found, strict=True))
        return scales.t().reshape(shape), zeros.t().reshape(shape)


class FixedLattice:
    """Scale and zero that are given, of any grouping."""

    def __init__(self, spec: QSpec, scale: Tensor, zero: Tensor) -> None:
        self.unit = _FIXED_UNIT
        self._stats = scale, zero
        grouping = spec.grouping
        self._columns = [
            grouping.ungroup(stat.float().expand(grouping.matrix_shape)).t() for stat in (scale, zero)
        ]

    def at(self, first: int, last: int, columns: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero = (stat[first:last].contiguous() for stat in self._columns)
        return scale, zero

    def stats(self) -> tuple[Tensor, Tensor]:
        return self._stats
