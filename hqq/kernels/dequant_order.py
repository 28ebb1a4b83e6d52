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
def block_of(pid, blocks, row_blocks, stripe, STRIPED: tl.constexpr):
    """Row and column, in blocks, of program `pid`: row by row, if STRIPED within stripes `stripe` blocks wide."""
    if STRIPED:
        first = pid // (stripe * row_blocks) * stripe
        within, width = pid - first * row_blocks, tl.minimum(stripe, blocks - first)
    else:
        first, within, width = 0, pid, blocks
    return within // width, first + within % width


@triton.jit
def asker_of(pid, BURST: tl.constexpr, PHASE: tl.constexpr):
    """Whether program `pid` asks ahead, and its number among those that do; see `Config`."""
    place = pid % PHASE
    return place < PHASE // BURST, pid // PHASE * (PHASE // BURST) + place
