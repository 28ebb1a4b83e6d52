"""The last kernel of every solver: codes for given lattices, packed.

It sees matrices as the dequantisation kernel does (`hqq.kernels.dequant_view`), turned round: each field of a tile of
packed codes is one tile of the weight, read as a contiguous stretch.
"""

# Written in Triton's language, which is not quite Python: branches on constants choose what is compiled.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from hqq.kernels.solve_tiles import exact_codes


@triton.jit(do_not_specialize=["rows", "packed_rows", "packed_groups"])
def encode_kernel(
    W,
    W_q,
    inverse,
    zero,
    rows,
    packed_rows,
    packed_groups,
    columns,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    MAX_CODE: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Pack `clamp(round(W * inverse + zero), 0, MAX_CODE)` for one tile of packed codes."""
    pid = tl.program_id(0)
    if GROUPS == "columns":
        width = columns
        blocks = (columns + TILE_COLUMNS - 1) // TILE_COLUMNS
        block_row, block_column = pid // blocks, pid % blocks
    else:
        # One tile is as wide as the matrix. As a constant, the width tells the compiler how rows are aligned.
        width: tl.constexpr = TILE_COLUMNS
        block_row, block_column = pid, 0
    column = block_column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    in_width = column < width
    if WIDE:
        block_row, packed_rows = block_row.to(tl.int64), packed_rows.to(tl.int64)
        packed_groups = packed_groups.to(tl.int64)
    row = block_row * TILE_ROWS + tl.arange(0, TILE_ROWS)
    keep = (row < packed_rows)[:, None] & in_width[None, :]
    place = row[:, None] * width + column[None, :]
    weights, inverses, zeros = (), (), ()
    for i in tl.static_range(FIELDS):
        in_rows = (row < packed_rows) & (row + i * packed_rows < rows)
        weights += (
            tl.load(
                W + i * packed_rows * width + place, mask=in_rows[:, None] & in_width[None, :], other=0.0
            ),
        )
        if GROUPS == "columns":
            group, has_group = column, in_width
        elif GROUPS == "rows":
            group, has_group = row // SPLIT + i * packed_groups, in_rows
        else:
            group, has_group = row * 0, in_rows
        inverses += (tl.load(inverse + group, mask=has_group, other=0.0),)
        zeros += (tl.load(zero + group, mask=has_group, other=0.0),)
    packed = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.int32)
    for i in tl.static_range(FIELDS):
        if GROUPS == "columns":
            scaled, z = weights[i].to(tl.float32) * inverses[i][None, :], zeros[i][None, :]
        else:
            scaled, z = weights[i].to(tl.float32) * inverses[i][:, None], zeros[i][:, None]
        # Rows that pad the last field have codes of zero.
        in_rows = (row + i * packed_rows < rows)[:, None]
        code = tl.where(in_rows, exact_codes(scaled, z, MAX_CODE), 0.0).to(tl.int32)
        packed |= code << (BITS * (FIELDS - 1 - i))
    tl.store(W_q + place, packed.to(W_q.dtype.element_ty), mask=keep)
