"""The one place that knows what `axis` and `group_size` mean.

A tensor is seen as a matrix whose groups are its rows (axis=1) or its columns (axis=0):

- axis=1: `W.reshape(-1, group_size)`, a group is `group_size` neighbours in memory.
- axis=0: `W.reshape(group_size, -1)`, a group is one column. For W [N, K] with group_size | N, element (n, k) is in
  group `(n mod R) * K + k` with R = N / group_size.
- group_size=None: whole channel, a row (axis=1) or a column (axis=0) of `W.reshape(shape[0], -1)`.
- per_tensor: the whole tensor is one group (used for quantised zeros); without a group_size it keeps its own shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from hqq.errors import ConfigError, ShapeError


@dataclass(frozen=True)
class Grouping:
    """How a tensor of `shape` falls into groups; see the module's text."""

    shape: tuple[int, ...]
    group_size: int | None
    axis: int
    per_tensor: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.axis, bool) or not isinstance(self.axis, int) or self.axis not in (0, 1):
            raise ConfigError(
                f"got axis={self.axis!r}; expected 0 (groups are columns) or 1 (groups are rows)"
            )
        if self.numel == 0:
            raise ShapeError(
                f"got an empty tensor of shape {tuple(self.shape)}; expected at least one element"
            )
        if self.group_size is None:
            return
        gs = self.group_size
        if isinstance(gs, bool) or not isinstance(gs, int) or gs < 1:
            raise ConfigError(
                f"got group_size={gs!r}; expected a positive integer, or None for whole channels"
            )
        if self.numel % gs:
            raise ConfigError(
                f"group_size={gs} does not divide the {self.numel} elements of a tensor of shape "
                f"{tuple(self.shape)}; {_suggestion(self.numel, gs)}"
            )

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of the grouped matrix, [G, gs] for axis=1 and [gs, G] for axis=0."""
        if self.group_size is None:
            if self.per_tensor:
                return self.shape
            rows = self.shape[0] if len(self.shape) > 1 else 1
            return (rows, self.numel // rows)
        rest = self.numel // self.group_size
        return (rest, self.group_size) if self.axis == 1 else (self.group_size, rest)

    @property
    def rows(self) -> int:
        """Rows of the grouped matrix: what bit packing stacks."""
        return self.matrix_shape[0] if self.matrix_shape else 1

    @property
    def stat_shape(self) -> tuple[int, ...]:
        """Shape of scale and zero: (G, 1) for axis=1, (1, G) for axis=0, () per tensor."""
        if self.per_tensor:
            return ()
        matrix = self.matrix_shape
        return (matrix[0], 1) if self.axis == 1 else (1, matrix[1])

    @property
    def num_groups(self) -> int:
        """Number of groups G."""
        return math.prod(self.stat_shape)

    @property
    def length(self) -> int:
        """Number of elements in one group."""
        return self.numel // self.num_groups

    def group(self, W: Tensor) -> Tensor:
        """Return `W` (of `shape`) as the grouped matrix."""
        return W.reshape(self.matrix_shape)

    def ungroup(self, matrix: Tensor) -> Tensor:
        """Return the grouped matrix in the tensor's own shape."""
        return matrix.reshape(self.shape)


def _suggestion(numel: int, group_size: int) -> str:
    fitting = [g for g in (8, 16, 32, 48, 64, 96, 128, 256, 512, 1024) if numel % g == 0]
    if fitting:
        return "use one of " + ", ".join(map(str, fitting)) + ", or None for whole channels"
    return f"use a divisor of {numel}, or None for whole channels (not {group_size})"
