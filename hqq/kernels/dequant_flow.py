"""What keeps the memory busy around the dequantisation kernel's arithmetic; no result depends on it.

Few reads among many writes cost a GPU's memory several times their bytes, since it turns around between the two. So
every so many programs one asks for the inputs of many to come at once, in the order that `dequant_order` has.
"""

# Written in Triton's language, which is not quite Python: branches on constants choose what is compiled.
# mypy: ignore-errors

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
def reserve_shared(pid, RESERVE: tl.constexpr):
    """Reserve shared memory, with PTX that names its size, so that fewer programs fit on a multiprocessor."""
    tl.inline_asm_elementwise(RESERVE, "=r,r", [pid], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def prefetch_codes(W_q, packed_rows, row, ROWS: tl.constexpr, COLUMNS: tl.constexpr, THREADS: tl.constexpr):
    """Ask for ROWS packed rows, COLUMNS wide, from `row` on."""
    first = tl.cast(row, tl.int64) * COLUMNS
    _prefetch(W_q, tl.cast(packed_rows, tl.int64) * COLUMNS, first, 0, ROWS * COLUMNS, 1, LONG, THREADS)


@triton.jit
def prefetch_groups(
    scale,
    zero,
    rows,
    packed_groups,
    row,
    field,
    ROWS: tl.constexpr,
    FIELDS: tl.constexpr,
    SPLIT: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Ask for scale and zero of FIELDS fields, from `field` on, in ROWS packed rows from `row` on."""
    groups: tl.constexpr = (ROWS + SPLIT - 1) // SPLIT
    group = tl.cast(row, tl.int64) // SPLIT + tl.cast(field, tl.int64) * packed_groups
    _prefetch(scale, rows // SPLIT, group, packed_groups, groups, FIELDS, SHORT, THREADS)
    _prefetch(zero, rows // SPLIT, group, packed_groups, groups, FIELDS, SHORT, THREADS)


@triton.jit
def prefetch_columns(
    W_q,
    packed_rows,
    columns,
    row,
    column,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Ask for COLUMNS columns of ROWS packed rows."""
    first = tl.cast(row, tl.int64) * columns + column
    _prefetch(W_q, packed_rows.to(tl.int64) * columns, first, columns, COLUMNS, ROWS, LONG, THREADS)


@triton.jit
def prefetch_stats_of_columns(scale, zero, columns, column, COLUMNS: tl.constexpr, THREADS: tl.constexpr):
    """Ask for scale and zero of COLUMNS columns."""
    _prefetch(scale, columns, column, 0, COLUMNS, 1, LONG, THREADS)
    _prefetch(zero, columns, column, 0, COLUMNS, 1, LONG, THREADS)


@triton.jit
def prefetch_outer(scale, zero, groups, MODE: tl.constexpr, THREADS: tl.constexpr):
    """Ask for the scales and zeros of a quantised statistic: all `groups` of them, up to THREADS pieces."""
    if MODE == "one":
        _prefetch_line(scale)
        _prefetch_line(zero)
    elif MODE == "runs" or MODE == "columns":
        most: tl.constexpr = THREADS * SHORT * 8 // scale.dtype.element_ty.primitive_bitwidth - 1
        _prefetch(scale, groups, 0, 0, most, 1, SHORT, THREADS)
        _prefetch(zero, groups, 0, 0, most, 1, SHORT, THREADS)


@triton.jit
def _prefetch(
    tensor,
    count,
    first,
    apart,
    NUMBER: tl.constexpr,
    STRETCHES: tl.constexpr,
    PIECE: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Ask for elements of `tensor` [count] to come to the L2 cache: NUMBER from `first` on, and so STRETCHES times.

    `apart`: elements from the start of one stretch to the start of the next. Each is asked for in pieces of PIECE bytes
    at multiples of 16 bytes; those that are not wholly within the tensor are left out.
    """
    BYTES: tl.constexpr = NUMBER * tensor.dtype.element_ty.primitive_bitwidth // 8
    PIECES: tl.constexpr = BYTES // PIECE + 1
    first = tl.cast(first, tl.int64)
    begin, end = tensor.to(tl.int64), (tensor + tl.cast(count, tl.int64)).to(tl.int64)
    # All stretches at once, a piece for each thread: one after the other would be as many copies of this code.
    for chunk in tl.static_range((PIECES * STRETCHES + THREADS - 1) // THREADS):
        piece = chunk * THREADS + tl.arange(0, THREADS)
        if STRETCHES > 1:
            in_stretches = piece < PIECES * STRETCHES
            start = (tensor + (first + (piece // PIECES).to(tl.int64) * apart)).to(tl.int64)
            piece = piece % PIECES
        else:
            in_stretches = True
            start = (tensor + first).to(tl.int64)
        at = (start & -16) + piece * PIECE
        wanted = in_stretches & (at >= begin) & (at < start + BYTES) & (at + PIECE <= end)
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


@triton.jit
def _prefetch_line(pointer):
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l",
        [pointer.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
