"""Which block of the matrix each program of the dequantisation kernel takes, and which programs ask ahead.

Row after row, so that memory is written in order; where groups are columns, within stripes so narrow that the L2 cache
keeps their scales and zeros for the next row.
"""

# Written in Triton's language, which is not quite Python: branches on constants choose what is compiled.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def number_of(row_blocks, stripe):
    """Number of this program in a grid of columns, rows and stripes, in the order in which the GPU starts them."""
    return (tl.program_id(2) * row_blocks + tl.program_id(1)) * stripe + tl.program_id(0)


@triton.jit
def block_of(pid, blocks, row_blocks, stripe, STRIPED: tl.constexpr, TURNING: tl.constexpr):
    """Row and column, in blocks, of program `pid`, and whether the row is gone through backwards.

    Row by row, if STRIPED within stripes `stripe` blocks wide; if TURNING every other row backwards.
    """
    if STRIPED:
        first = pid // (stripe * row_blocks) * stripe
        within, width = pid - first * row_blocks, tl.minimum(stripe, blocks - first)
    else:
        first, within, width = 0, pid, blocks
    return turned(within // width, first, within % width, width, TURNING)


@triton.jit
def turned(row, first, column, width, TURNING: tl.constexpr):
    """What `block_of` returns, for column `column` of a row of a stripe that starts at `first`."""
    if TURNING:
        backwards = row % 2 == 1
        column = tl.where(backwards, width - 1 - column, column)
    else:
        backwards = False
    return row, first + column, backwards


@triton.jit
def asker_of(pid, BURST: tl.constexpr, PHASE: tl.constexpr):
    """Whether program `pid` asks ahead, and its number among those that do; see `Config`."""
    place = pid % PHASE
    return place < PHASE // BURST, pid // PHASE * (PHASE // BURST) + place
