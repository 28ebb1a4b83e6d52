"""What keeps the memory busy around the dequantisation kernel's arithmetic; no result depends on it.

Few reads among many writes cost a GPU's memory several times their bytes, since it turns around between the two. So
the order of the programs keeps scales and zeros of columns in the L2 cache, and every so many programs one asks for the
inputs of many to come at once.
"""

# Written in Triton's language, which is not quite Python: branches on constants choose what is compiled.
# mypy: ignore-errors
# ruff: noqa: RET505

from __future__ import annotations

import triton
import triton.language as tl

# Bytes that one instruction asks for: of long stretches, and of the short ones that are a field's scales.
LONG = tl.constexpr(1024)
SHORT = tl.constexpr(128)


# Triton has these two from 3.4 on, with the launch option that they need.
GDC_LAUNCH_DEPENDENTS = getattr(getattr(tl.extra, "cuda", None), "gdc_launch_dependents", None)
GDC_WAIT = getattr(getattr(tl.extra, "cuda", None), "gdc_wait", None)


@triton.jit
def start_next():
    """Let the next kernel's programs start where this one leaves room, if it is one that waits for this one's end."""
    GDC_LAUNCH_DEPENDENTS()


@triton.jit
def wait_for_previous():
    """Wait until what ran before on the stream is complete and its results can be read."""
    GDC_WAIT()


@triton.jit
def block_of(pid, blocks, row_blocks, stripe, STRIPED: tl.constexpr):
    """Row and column, in blocks, of program `pid`: row by row, if STRIPED within stripes `stripe` blocks wide."""
    if STRIPED:
        first = pid // (stripe * row_blocks) * stripe
        within, width = pid - first * row_blocks, tl.minimum(stripe, blocks - first)
        return within // width, first + within % width
    else:
        return pid // blocks, pid % blocks


@triton.jit
def asker_of(pid, BURST: tl.constexpr, PHASE: tl.constexpr):
    """Whether program `pid` asks ahead, and its number among those that do; see `Config`."""
    place = pid % PHASE
    return place < PHASE // BURST, pid // PHASE * (PHASE // BURST) + place


@triton.jit
def prefetch_codes(W_q, packed_rows, row, ROWS: tl.constexpr, COLUMNS: tl.constexpr, THREADS: tl.constexpr):
    """Ask for ROWS packed rows, COLUMNS wide, from `row` on."""
    first = tl.cast(row, tl.int64) * COLUMNS
    _prefetch(W_q, tl.cast(packed_rows, tl.int64) * COLUMNS, first, ROWS * COLUMNS, LONG, THREADS)


@triton.jit
def prefetch_groups(
    scale,
    zero,
    rows,
    packed_groups,
    row,
    field,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Ask for scale and zero of `field` in ROWS packed rows from `row` on."""
    groups: tl.constexpr = (ROWS + SPLIT - 1) // SPLIT
    group = tl.cast(row, tl.int64) // SPLIT + tl.cast(field, tl.int64) * packed_groups
    _prefetch(scale, rows // SPLIT, group, groups, SHORT, THREADS)
    _prefetch(zero, rows // SPLIT, group, groups, SHORT, THREADS)


@triton.jit
def prefetch_columns(
    W_q,
    scale,
    zero,
    packed_rows,
    columns,
    row,
    column,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Ask for COLUMNS columns of ROWS packed rows, and with the first row for the columns' scale and zero."""
    row = tl.cast(row, tl.int64)
    for t in tl.static_range(ROWS):
        _prefetch(
            W_q, packed_rows.to(tl.int64) * columns, (row + t) * columns + column, COLUMNS, LONG, THREADS
        )
    if row == 0:
        _prefetch(scale, columns, column, COLUMNS, LONG, THREADS)
        _prefetch(zero, columns, column, COLUMNS, LONG, THREADS)


@triton.jit
def _prefetch(tensor, count, first, NUMBER: tl.constexpr, PIECE: tl.constexpr, THREADS: tl.constexpr):
    """Ask for elements first to first + NUMBER of `tensor` [count] to come to the L2 cache.

    In pieces of PIECE bytes at multiples of 16 bytes; those that are not wholly within the tensor are left out.
    """
    BITS: tl.constexpr = tensor.dtype.element_ty.primitive_bitwidth
    BYTES: tl.constexpr = NUMBER * BITS // 8
    first = tl.cast(first, tl.int64)
    begin, end = tensor.to(tl.int64), (tensor + tl.cast(count, tl.int64)).to(tl.int64)
    start, stop = (tensor + first).to(tl.int64), (tensor + first + NUMBER).to(tl.int64)
    for chunk in tl.static_range((BYTES // PIECE + THREADS) // THREADS):
        at = (start & -16) + (chunk * THREADS + tl.arange(0, THREADS)) * PIECE
        wanted = (at >= begin) & (at < stop) & (at + PIECE <= end)
        if PIECE == 1024:
            _prefetch_long(at, wanted)
        else:
            _prefetch_short(at, wanted)


@triton.jit
def _prefetch_long(at, wanted):
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], 1024; mov.u32 $0, 0; }",
        "=r,l,r",
        [at, wanted.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _prefetch_short(at, wanted):
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], 128; mov.u32 $0, 0; }",
        "=r,l,r",
        [at, wanted.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
