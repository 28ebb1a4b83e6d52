"""The dequantisation kernel: one for every bit width, axis, group size, dtype and kind of scale and zero.

It sees the packed codes as a matrix [packed_rows, columns] and the result as [rows, columns]; field i of packed row r
is row r + i * packed_rows. A program takes a tile of packed codes, and each field of the tile is one tile of results,
so that both sides move as whole contiguous stretches. Groups are runs of `SPLIT` rows (GROUPS "rows"), columns
("columns"), or everything ("one"); see `view_of` for how a tensor becomes this matrix. `dequant_order` has the order
of the programs, `dequant_flow` what keeps memory busy: prefetching, and starting before the previous kernel ends.
"""

# Written in Triton's language, which is not quite Python: branches on constants choose what is compiled.
# mypy: ignore-errors
# ruff: noqa: C901

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from hqq.kernels.dequant_flow import (
    prefetch_codes,
    prefetch_columns,
    prefetch_groups,
    prefetch_outer,
    prefetch_stats_of_columns,
    reserve_shared,
    start_next,
    wait_for_previous,
)
from hqq.kernels.dequant_order import asker_of, block_of
from hqq.kernels.dequant_value import field_of, load_stats

# Only `columns` says how addresses are aligned; the other numbers would but multiply the compiled variants.
_JUST_NUMBERS = ["rows", "packed_rows", "packed_groups", "scale_period", "zero_period", "stripe", "distance"]
_NUMBERS = [*_JUST_NUMBERS, "columns"]


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

    stripe (if STRIPED), distance, BURST, PHASE, OVERLAP: see `Config`. RESERVE: None, or PTX that takes shared memory.
    WIDE: addresses need 64 bits. STAT: dtype that quantised scale and zero are dequantised to; SPAN: see `load_stat`.
    ASM: PTX for each field, or None for arithmetic that Triton writes, with roundings to DIFFERENCE, PRODUCT and OUT;
    STAT_ASM: the same for scale and zero.
    """
    pid, programs = tl.program_id(0), tl.num_programs(0)
    if RESERVE is not None:
        reserve_shared(pid, RESERVE)
    if OVERLAP == 1:
        start_next()
    if GROUPS == "columns":
        width = tl.cast(columns, tl.int64) if WIDE else columns
        blocks = (columns + TILE_COLUMNS - 1) // TILE_COLUMNS
        row_blocks = (packed_rows + TILE_ROWS * STEPS - 1) // (TILE_ROWS * STEPS)
        block_row, block_column = block_of(pid, blocks, row_blocks, stripe, STRIPED)
    else:
        # One tile is as wide as the matrix. As a constant, the width tells the compiler how rows are aligned.
        width: tl.constexpr = TILE_COLUMNS
        block_row, block_column = pid, 0
    if BURST > 0:
        asks, asker = asker_of(pid, BURST, PHASE)
        ahead = asker * BURST + distance
        if asks & (ahead < programs):
            if GROUPS == "columns":
                ahead_row, ahead_column = block_of(ahead, blocks, row_blocks, stripe, STRIPED)
                prefetch_columns(
                    W_q,
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
    if OVERLAP == 3:
        # The L2 cache is where all programs meet: what the previous kernel still writes arrives there too.
        if pid == 0:
            prefetch_outer(scale_scale, scale_zero, scale_period, SCALE_MODE, THREADS)
            prefetch_outer(zero_scale, zero_zero, zero_period, ZERO_MODE, THREADS)
        if GROUPS == "columns":
            first_row, first_column = block_row * STEPS, block_column * TILE_COLUMNS
            prefetch_columns(W_q, packed_rows, columns, first_row, first_column, TILE_COLUMNS, STEPS, THREADS)
            if block_row == 0:
                prefetch_stats_of_columns(scale, zero, columns, first_column, TILE_COLUMNS, THREADS)
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
                s, z = load_stats(
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
        s, z = load_stats(
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
    if OVERLAP >= 2:
        start_next()
    for t in tl.static_range(STEPS):
        of_step = row + t * TILE_ROWS
        for i in tl.static_range(FIELDS):
            if GROUPS == "rows":
                s, z = scales[t * FIELDS + i], zeros[t * FIELDS + i]
            value = field_of(
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


def signature_of(absent: Sequence[str]) -> list[str]:
    """Return the kind of each parameter in Triton's names: a pointer to whatever it is, a number, or a constant.

    absent: names of those that are None.
    """
    kinds = []
    for parameter in dequantize_kernel.params:
        constant = parameter.is_constexpr or parameter.name in absent
        kinds.append("constexpr" if constant else "i32" if parameter.name in _NUMBERS else "*u8")
    return kinds
