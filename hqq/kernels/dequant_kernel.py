"""The dequantisation kernel: one for every bit width, axis, group size, dtype and kind of scale and zero.

It sees the packed codes as a matrix [packed_rows, columns] and the result as [rows, columns]; field i of packed row r
is row r + i * packed_rows. A program takes a tile of packed codes, and each field of the tile is one tile of results,
so that both sides move as whole contiguous stretches. Groups are runs of `SPLIT` rows (GROUPS "rows"), columns
("columns"), or everything ("one"); see `view_of` for how a tensor becomes this matrix. `dequant_order` has the order
of the programs, `dequant_flow` what keeps memory busy: prefetching, and starting before the previous kernel ends.
"""

# Written in Triton's language, which is not quite Python: branches on constants choose what is compiled.
# mypy: ignore-errors
# ruff: noqa: C901, RET505, SIM102

from __future__ import annotations

import triton
import triton.language as tl

from hqq.kernels.dequant_asm import FOUR_BYTES_CONSTRAINTS
from hqq.kernels.dequant_flow import (
    prefetch_codes,
    prefetch_columns,
    prefetch_groups,
    prefetch_outer,
    reserve_shared,
    start_next,
    wait_for_previous,
)
from hqq.kernels.dequant_order import asker_of, block_of, number_of, turned
from hqq.kernels.rounding import rounded

FOUR_BYTES = tl.constexpr(FOUR_BYTES_CONSTRAINTS)


@triton.jit
def _load_stat(
    values,
    scale,
    zero,
    group,
    first,
    keep,
    period,
    MODE: tl.constexpr,
    SPAN: tl.constexpr,
    DTYPE: tl.constexpr,
    POLICY: tl.constexpr,
    ASM: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Scale or zero of `group`: a load, or 8-bit codes dequantised with a scale and zero of their own.

    Which of those a code has: the only one (MODE "one"), number group % period ("columns"; "runs" where the groups are
    the SPAN ones from `first` on, and `first` and `period` are multiples of SPAN), or group // period ("rows").
    """
    value = tl.load(values + group, mask=keep, eviction_policy=POLICY)
    if MODE == "plain":
        return value
    else:
        if MODE == "one":
            s, z = tl.load(scale), tl.load(zero)
        else:
            if MODE == "runs":
                outer = tl.multiple_of(first % period, SPAN) + (group - first)
            elif MODE == "columns":
                outer = group % period
            else:
                outer = group // period
            s, z = tl.load(scale + outer, mask=keep), tl.load(zero + outer, mask=keep)
        if ASM is not None:
            return tl.inline_asm_elementwise(
                ASM, FOUR_BYTES, [value, z, s], dtype=s.dtype, is_pure=True, pack=4
            )
        else:
            difference = rounded(value.to(tl.float32) - z.to(tl.float32), DTYPE, INTERPRETED)
            return rounded(difference * s.to(tl.float32), DTYPE, INTERPRETED).to(DTYPE)


@triton.jit
def _load_stats(
    scale,
    zero,
    scale_scale,
    scale_zero,
    zero_scale,
    zero_zero,
    group,
    first,
    keep,
    scale_period,
    zero_period,
    SCALE_MODE: tl.constexpr,
    ZERO_MODE: tl.constexpr,
    SPAN: tl.constexpr,
    DTYPE: tl.constexpr,
    POLICY: tl.constexpr,
    ASM: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Scale and zero of `group`."""
    s = _load_stat(
        scale,
        scale_scale,
        scale_zero,
        group,
        first,
        keep,
        scale_period,
        SCALE_MODE,
        SPAN,
        DTYPE,
        POLICY,
        ASM,
        INTERPRETED,
    )
    z = _load_stat(
        zero,
        zero_scale,
        zero_zero,
        group,
        first,
        keep,
        zero_period,
        ZERO_MODE,
        SPAN,
        DTYPE,
        POLICY,
        ASM,
        INTERPRETED,
    )
    return s, z


@triton.jit
def _field(
    w,
    zero,
    scale,
    FIELD: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    PACK: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    PRODUCT: tl.constexpr,
    OUT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """`(W_q - zero) * scale` of field FIELD of the packed codes `w`."""
    if ASM is not None:
        return tl.inline_asm_elementwise(
            ASM[FIELD], CONSTRAINTS, [w, zero, scale], dtype=zero.dtype, is_pure=True, pack=PACK
        )
    else:
        codes = ((w >> (BITS * (FIELDS - 1 - FIELD))) & ((1 << BITS) - 1)).to(tl.float32)
        difference = rounded(codes - zero.to(tl.float32), DIFFERENCE, INTERPRETED)
        product = rounded(difference * scale.to(tl.float32), PRODUCT, INTERPRETED)
        return rounded(product, OUT, INTERPRETED).to(OUT)


# Only `columns` says how addresses are aligned; the other numbers would but multiply the compiled variants.
_JUST_NUMBERS = ["rows", "packed_rows", "packed_groups", "scale_period", "zero_period", "stripe", "distance"]


@triton.jit(do_not_specialize=_JUST_NUMBERS)
def dequantize_kernel(
    W_q,
    out,
    scale,
    zero,
    scale_scale,
    scale_zero,
    zero_scale,
    zero_zero,
    rows,
    packed_rows,
    packed_groups,
    columns,
    scale_period,
    zero_period,
    stripe,
    distance,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    STRIPED: tl.constexpr,
    BURST: tl.constexpr,
    PHASE: tl.constexpr,
    OVERLAP: tl.constexpr,
    RESERVE: tl.constexpr,
    TURNING: tl.constexpr,
    OUTER: tl.constexpr,
    GRID: tl.constexpr,
    SCALE_MODE: tl.constexpr,
    ZERO_MODE: tl.constexpr,
    SPAN: tl.constexpr,
    STAT: tl.constexpr,
    STAT_ASM: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    PRODUCT: tl.constexpr,
    OUT: tl.constexpr,
    WIDE: tl.constexpr,
    ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    PACK: tl.constexpr,
    LOAD_POLICY: tl.constexpr,
    STAT_POLICY: tl.constexpr,
    STORE_HINT: tl.constexpr,
    THREADS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Dequantise STEPS tiles [TILE_ROWS, TILE_COLUMNS] of packed codes, one below the other.

    stripe (if STRIPED), distance, BURST, PHASE, OVERLAP, TURNING, OUTER: see `Config`. RESERVE: None, or PTX that takes
    shared memory. GRID: the grid has stripes of `stripe` columns, STRIPED or one of all. WIDE: addresses need 64 bits.
    STAT: dtype that quantised scale and zero are dequantised to; SPAN: see `_load_stat`. ASM: PTX for each field, or
    None for arithmetic that Triton writes, with roundings to DIFFERENCE, PRODUCT and OUT; STAT_ASM: the same for scale
    and zero.
    """
    pid, programs = tl.program_id(0), tl.num_programs(0)
    if RESERVE is not None:
        reserve_shared(pid, RESERVE)
    if OVERLAP == 1 or OVERLAP == 3:
        start_next()
    if GROUPS == "columns":
        width = tl.cast(columns, tl.int64) if WIDE else columns
        blocks = (columns + TILE_COLUMNS - 1) // TILE_COLUMNS
        row_blocks = (packed_rows + TILE_ROWS * STEPS - 1) // (TILE_ROWS * STEPS)
        if GRID:
            block_row, block_column, _ = turned(
                tl.program_id(1), tl.program_id(2) * stripe, pid, stripe, TURNING
            )
            pid, blocks = number_of(row_blocks, stripe), stripe * tl.num_programs(2)
            programs = blocks * row_blocks
        else:
            block_row, block_column, _ = block_of(pid, blocks, row_blocks, stripe, STRIPED, TURNING)
    else:
        # One tile is as wide as the matrix. As a constant, the width tells the compiler how rows are aligned.
        width: tl.constexpr = TILE_COLUMNS
        block_row, block_column = pid, 0
    if BURST > 0:
        asks, asker = asker_of(pid, BURST, PHASE)
        ahead = asker * BURST + distance
        if asks & (ahead < programs):
            if GROUPS == "columns":
                ahead_row, ahead_column, backwards = block_of(
                    ahead, blocks, row_blocks, stripe, STRIPED, TURNING
                )
                if TURNING:
                    ahead_column = tl.where(backwards, ahead_column - (BURST - 1), ahead_column)
                prefetch_columns(
                    W_q,
                    scale,
                    zero,
                    packed_rows,
                    columns,
                    ahead_row * STEPS,
                    ahead_column * TILE_COLUMNS,
                    BURST * TILE_COLUMNS,
                    STEPS,
                    THREADS,
                )
            else:
                prefetch_codes(
                    W_q,
                    packed_rows,
                    ahead * (TILE_ROWS * STEPS),
                    BURST * TILE_ROWS * STEPS,
                    TILE_COLUMNS,
                    THREADS,
                )
            if GROUPS == "rows":
                # The askers take turns with the fields, so that what one asks for is long enough to be worth a page.
                turn = asker % FIELDS
                prefetch_groups(
                    scale,
                    zero,
                    rows,
                    packed_groups,
                    ((asker - turn) * BURST + distance) * (TILE_ROWS * STEPS),
                    turn,
                    BURST * FIELDS * TILE_ROWS * STEPS,
                    1,
                    SPLIT,
                    THREADS,
                )
    if OVERLAP >= 3:
        # The L2 cache is where all programs meet: what the previous kernel still writes arrives there too.
        if OUTER:
            if pid == 0:
                prefetch_outer(scale_scale, scale_zero, scale_period, SCALE_MODE, THREADS)
                prefetch_outer(zero_scale, zero_zero, zero_period, ZERO_MODE, THREADS)
        if GROUPS == "columns":
            prefetch_columns(
                W_q,
                scale,
                zero,
                packed_rows,
                columns,
                block_row * STEPS,
                block_column * TILE_COLUMNS,
                TILE_COLUMNS,
                STEPS,
                THREADS,
            )
        else:
            of_tile = block_row * (TILE_ROWS * STEPS)
            prefetch_codes(W_q, packed_rows, of_tile, TILE_ROWS * STEPS, TILE_COLUMNS, THREADS)
        if GROUPS == "rows":
            prefetch_groups(
                scale, zero, rows, packed_groups, of_tile, 0, TILE_ROWS * STEPS, FIELDS, SPLIT, THREADS
            )
    if OVERLAP > 0:
        wait_for_previous()
    column = block_column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    if WIDE:
        block_row, packed_rows = block_row.to(tl.int64), packed_rows.to(tl.int64)
        packed_groups = packed_groups.to(tl.int64)
    row = block_row * (TILE_ROWS * STEPS) + tl.arange(0, TILE_ROWS)
    place = row[:, None] * width + column[None, :]
    in_width = column < width
    # Everything is loaded before the first store: a load behind a store would wait for its turn.
    codes, kept, kept_rows = (), (), ()
    for t in tl.static_range(STEPS):
        kept_rows += (row + t * TILE_ROWS < packed_rows,)
        kept += (kept_rows[t][:, None] & in_width[None, :],)
        codes += (tl.load(W_q + t * TILE_ROWS * width + place, mask=kept[t], eviction_policy=LOAD_POLICY),)
    if GROUPS == "rows":
        scales, zeros = (), ()
        for t in tl.static_range(STEPS):
            of_step = row + t * TILE_ROWS
            of_group = of_step // SPLIT
            first = (block_row * STEPS + t) * TILE_ROWS // SPLIT
            for i in tl.static_range(FIELDS):
                s, z = _load_stats(
                    scale,
                    zero,
                    scale_scale,
                    scale_zero,
                    zero_scale,
                    zero_zero,
                    of_group + i * packed_groups,
                    first + i * packed_groups,
                    kept_rows[t] & (of_step + i * packed_rows < rows),
                    scale_period,
                    zero_period,
                    SCALE_MODE,
                    ZERO_MODE,
                    SPAN,
                    STAT,
                    STAT_POLICY,
                    STAT_ASM,
                    INTERPRETED,
                )
                scales += (s[:, None],)
                zeros += (z[:, None],)
    else:
        group, keep = (column, in_width) if GROUPS == "columns" else (0, None)
        s, z = _load_stats(
            scale,
            zero,
            scale_scale,
            scale_zero,
            zero_scale,
            zero_zero,
            group,
            block_column * TILE_COLUMNS,
            keep,
            scale_period,
            zero_period,
            SCALE_MODE,
            ZERO_MODE,
            SPAN,
            STAT,
            STAT_POLICY,
            STAT_ASM,
            INTERPRETED,
        )
        if GROUPS == "columns":
            s, z = s[None, :], z[None, :]
    if OVERLAP == 2 or OVERLAP == 4:
        start_next()
    for t in tl.static_range(STEPS):
        of_step = row + t * TILE_ROWS
        for i in tl.static_range(FIELDS):
            if GROUPS == "rows":
                s, z = scales[t * FIELDS + i], zeros[t * FIELDS + i]
            value = _field(
                codes[t],
                z,
                s,
                i,
                BITS,
                FIELDS,
                ASM,
                CONSTRAINTS,
                PACK,
                DIFFERENCE,
                PRODUCT,
                OUT,
                INTERPRETED,
            )
            in_field = kept[t] & (of_step + i * packed_rows < rows)[:, None]
            target = out + i * packed_rows * width + t * TILE_ROWS * width + place
            tl.store(target, value, mask=in_field, cache_modifier=STORE_HINT)
