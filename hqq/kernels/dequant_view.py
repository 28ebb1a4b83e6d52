"""How a quantised tensor becomes the matrix that the dequantisation kernel works on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hqq.core.bitpack import PackFormat
from hqq.core.grouping import Grouping

# Narrower runs than this are not worth a tile row of their own: each element then looks up its group.
_NARROWEST = 4


@dataclass(frozen=True)
class MatrixView:
    """A matrix [rows, columns] of codes, packed as [packed_rows, columns].

    groups: "rows": `split` neighbouring rows share a scale and zero, and packed rows hold `packed_groups` groups per
    field; "columns": each column has its own; "one": all share one.
    """

    groups: str
    rows: int
    packed_rows: int
    columns: int
    split: int
    packed_groups: int


def view_of(grouping: Grouping, fmt: PackFormat, widest: int) -> MatrixView:
    """Return the matrix of a tensor grouped by `grouping` and packed as `fmt`, with rows of at most `widest` elements.

    Only groups that are columns keep their matrix's width. Otherwise each row of the grouped matrix is cut into runs
    whose length is a power of two, so that tiles lose nothing to group sizes like 48 or 96.
    """
    matrix = grouping.matrix_shape or (1,)
    rows, columns = matrix[0], math.prod(matrix[1:])
    packed = fmt.packed_rows(rows)
    if grouping.num_groups > 1 and grouping.axis == 0 and not grouping.per_tensor:
        return MatrixView("columns", rows, packed, columns, 1, columns)
    run = min(columns & -columns, widest)
    if run < _NARROWEST:
        run = 1
    split = columns // run
    groups = "rows" if grouping.num_groups > 1 else "one"
    return MatrixView(groups, rows * split, packed * split, run, split, packed)
