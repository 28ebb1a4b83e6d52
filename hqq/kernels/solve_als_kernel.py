"""The ALS solver as one kernel: what `hqq.core.solvers.als` does, with a block of groups in registers throughout.

Every pass is six operations on each element: a multiply-add that saturates, a multiply-add that rounds, a subtraction
that takes the rounding constant off, and the sums of q, q*q and q*v. See `als_search` for what they are good for.
"""

# Written in Triton's language, which is not quite Python: branches on constants choose what is compiled.
# mypy: ignore-errors
# ruff: noqa: RET505, SIM300

from __future__ import annotations

import triton
import triton.language as tl

from hqq.kernels.rounding import rounded
from hqq.kernels.solve_lattice import min_max, rint
from hqq.kernels.solve_tiles import ends, exact_codes, load_tiles, only_live, quick_codes, totals

_LEAST_SCALE = tl.constexpr(1e-3)
_LEAST_SPREAD = tl.constexpr(1e-4)


@triton.jit
def _fit(
    tiles,
    slope,
    offset,
    total,
    mean,
    centre,
    C: tl.constexpr,
    T: tl.constexpr,
    GS: tl.constexpr,
    MAX_CODE: tl.constexpr,
    SATURATE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Round the groups to `v * slope + offset` and fit their lattice: (gain, s, b), one number for each group.

    Codes count from `centre`: sums of large numbers would lose what tells one lattice of 8 bits from the next.
    """
    if SATURATE:
        slope, offset = slope * (1.0 / MAX_CODE), offset * (1.0 / MAX_CODE)
    slope, offset, shift = slope[:, None], offset[:, None], centre[:, None]
    q = only_live(quick_codes(tiles[0], slope, offset, shift, MAX_CODE, SATURATE), 0, C, GS)
    sum_q, sum_qq, sum_qv = q, q * q, q * tiles[0]
    for t in tl.static_range(1, T):
        q = only_live(quick_codes(tiles[t], slope, offset, shift, MAX_CODE, SATURATE), t, C, GS)
        sum_q += q
        sum_qq = tl.fma(q, q, sum_qq)
        sum_qv = tl.fma(q, tiles[t], sum_qv)
    sum_q, sum_qq, sum_qv = totals(sum_q, sum_qq, sum_qv, INTERPRETED)
    mean_q = sum_q * (1.0 / GS)
    deviation = tl.maximum(sum_qq - mean_q * sum_q, _LEAST_SPREAD)
    covariance = sum_qv - mean_q * total
    s = tl.maximum(covariance / deviation, _LEAST_SCALE)
    return covariance * s, s, mean - s * (mean_q + centre)


@triton.jit
def _descend(
    tiles,
    gain,
    best_s,
    best_b,
    total,
    mean,
    centre,
    FITS: tl.constexpr,
    OVERSHOOT: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    GS: tl.constexpr,
    MAX_CODE: tl.constexpr,
    SATURATE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The best lattice (gain, s, b) of the given one and those that FITS further fits lead to."""
    s, b = best_s, best_b
    for _ in range(FITS):
        slope = 1.0 / s
        g, new_s, new_b = _fit(
            tiles, slope, -(slope * b), total, mean, centre, C, T, GS, MAX_CODE, SATURATE, INTERPRETED
        )
        better = g > gain
        gain = tl.where(better, g, gain)
        best_s, best_b = tl.where(better, new_s, best_s), tl.where(better, new_b, best_b)
        s = tl.maximum(s + OVERSHOOT * (new_s - s), _LEAST_SCALE)
        b = b + OVERSHOOT * (new_b - b)
    return gain, best_s, best_b


@triton.jit
def _search(
    tiles,
    starts,
    total,
    mean,
    centre,
    SCALES: tl.constexpr,
    OFFSETS: tl.constexpr,
    FITS_PER_OFFSET: tl.constexpr,
    FITS_OF_BEST: tl.constexpr,
    OVERSHOOT: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    GS: tl.constexpr,
    MAX_CODE: tl.constexpr,
    SATURATE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The lattice (s, b) of each group with the least squared error. starts: what `start_table` returns."""
    gain = tl.full(total.shape, float("-inf"), tl.float32)
    best_s, best_b = tl.full(total.shape, 1.0, tl.float32), tl.zeros(total.shape, tl.float32)
    for offset in range(OFFSETS):
        g_best = tl.full(total.shape, float("-inf"), tl.float32)
        s_best, b_best = tl.full(total.shape, 1.0, tl.float32), tl.zeros(total.shape, tl.float32)
        for scale in range(SCALES):
            row = starts + (offset * SCALES + scale) * 4
            slope, minus_slope, b, reach = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
            b = tl.minimum(tl.maximum(mean, -reach), reach) + b
            g, s, b = _fit(
                tiles,
                tl.zeros(total.shape, tl.float32) + slope,
                b * minus_slope,
                total,
                mean,
                centre,
                C,
                T,
                GS,
                MAX_CODE,
                SATURATE,
                INTERPRETED,
            )
            better = g > g_best
            g_best = tl.where(better, g, g_best)
            s_best, b_best = tl.where(better, s, s_best), tl.where(better, b, b_best)
        g_best, s_best, b_best = _descend(
            tiles,
            g_best,
            s_best,
            b_best,
            total,
            mean,
            centre,
            FITS_PER_OFFSET,
            OVERSHOOT,
            C,
            T,
            GS,
            MAX_CODE,
            SATURATE,
            INTERPRETED,
        )
        better = g_best > gain
        gain = tl.where(better, g_best, gain)
        best_s, best_b = tl.where(better, s_best, best_s), tl.where(better, b_best, best_b)
    gain, best_s, best_b = _descend(
        tiles,
        gain,
        best_s,
        best_b,
        total,
        mean,
        centre,
        FITS_OF_BEST,
        OVERSHOOT,
        C,
        T,
        GS,
        MAX_CODE,
        SATURATE,
        INTERPRETED,
    )
    return best_s, best_b


@triton.jit
def _stored(x, STORAGE: tl.constexpr, INTERPRETED: tl.constexpr):
    """`x` rounded to STORAGE; as it is where it overflows there."""
    if STORAGE == tl.float32:
        return x
    else:
        value = rounded(x, STORAGE, INTERPRETED)
        return tl.where(tl.abs(value) < float("inf"), value, x)


@triton.jit
def _reciprocal(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def _usable(scale, zero):
    return (scale > 0.0) & (_reciprocal(scale) < float("inf")) & (tl.abs(zero) < float("inf"))


@triton.jit
def _store(
    tiles,
    unit,
    fallback_zero,
    scale,
    zero,
    ZERO_FITS: tl.constexpr,
    STORAGE: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    GS: tl.constexpr,
    MAX_CODE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The better of (unit, fallback_zero) and (scale, zero) as stored, with the zero fitted for the stored scale.

    Returns scale, zero, error, and the error of the first.
    """
    inverse_unit = _reciprocal(unit)[:, None]
    lattice_scale, lattice_zero = _stored(scale, STORAGE, INTERPRETED), _stored(zero, STORAGE, INTERPRETED)
    scale, zero = _stored(unit, STORAGE, INTERPRETED), _stored(fallback_zero, STORAGE, INTERPRETED)
    best_scale, best_zero = scale, zero
    least, limit = tl.zeros(unit.shape, tl.float32), tl.zeros(unit.shape, tl.float32)
    for attempt in range(ZERO_FITS + 2):
        inverse = _reciprocal(scale)[:, None]
        error, drift = tl.zeros(tiles[0].shape, tl.float32), tl.zeros(tiles[0].shape, tl.float32)
        for t in tl.static_range(T):
            scaled = tiles[t] * inverse
            q = exact_codes(scaled, zero[:, None], MAX_CODE)
            residual = ((q - zero[:, None]) * scale[:, None] - tiles[t]) * inverse_unit
            residual = only_live(residual, t, C, GS)
            error = tl.fma(residual, residual, error)
            drift += only_live(q - scaled, t, C, GS)
        error, drift, _ = totals(error, drift, drift, INTERPRETED)
        first = attempt == 0  # the fallback, which needs no reason to be taken
        better = ((error < least) & _usable(scale, zero)) | first
        best_scale, best_zero = tl.where(better, scale, best_scale), tl.where(better, zero, best_zero)
        least, limit = tl.where(better, error, least), tl.where(first, error, limit)
        refitted = _stored(drift * (1.0 / GS), STORAGE, INTERPRETED)
        scale, zero = tl.where(first, lattice_scale, scale), tl.where(first, lattice_zero, refitted)
    return best_scale, best_zero, least, limit


@triton.jit
def _extend(
    tiles,
    unit,
    scale,
    zero,
    error,
    limit,
    EXTENT: tl.constexpr,
    STORAGE: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    GS: tl.constexpr,
    MAX_CODE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The scale that gives back EXTENT of the lost extent for the codes of (scale, zero), where that pays."""
    inverse, inverse_unit, z = _reciprocal(scale)[:, None], _reciprocal(unit)[:, None], zero[:, None]
    along, levels2, squares = (
        tl.zeros(tiles[0].shape, tl.float32),
        tl.zeros(tiles[0].shape, tl.float32),
        tl.zeros(tiles[0].shape, tl.float32),
    )
    for t in tl.static_range(T):
        level = only_live(exact_codes(tiles[t] * inverse, z, MAX_CODE) - z, t, C, GS)
        value = only_live(tiles[t] * inverse_unit, t, C, GS)
        along, levels2 = tl.fma(level, value, along), tl.fma(level, level, levels2)
        squares = tl.fma(value, value, squares)
    along, levels2, squares = totals(along, levels2, squares, INTERPRETED)
    # Groups of zeros have neither; any scale will do for the moment.
    fitted = along / tl.where(levels2 == 0.0, 1.0, levels2)
    unbiased = squares / tl.where(along == 0.0, 1.0, along)
    extended = _stored((fitted + EXTENT * (unbiased - fitted)) * unit, STORAGE, INTERPRETED)
    found = tl.zeros(tiles[0].shape, tl.float32)
    for t in tl.static_range(T):
        level = exact_codes(tiles[t] * inverse, z, MAX_CODE) - z
        residual = only_live((level * extended[:, None] - tiles[t]) * inverse_unit, t, C, GS)
        found = tl.fma(residual, residual, found)
    found = tl.sum(found, 1)
    # found <= error * squares / (squares - error), without a division by nothing.
    pays = (found * (squares - error) <= error * squares) & (squares > error)
    taken = (error < limit) & (found < limit) & pays & _usable(extended, zero)
    return tl.where(taken, extended, scale)


# Only `groups` says how addresses are aligned.
@triton.jit(do_not_specialize=["origin", "same_origin"])
def als_kernel(
    W,
    starts,
    scale_out,
    zero_out,
    inverse_out,
    flags,
    groups,
    origin,
    same_origin,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    GS: tl.constexpr,
    AXIS: tl.constexpr,
    MAX_CODE: tl.constexpr,
    STORAGE: tl.constexpr,
    SCALES: tl.constexpr,
    OFFSETS: tl.constexpr,
    FITS_PER_OFFSET: tl.constexpr,
    FITS_OF_BEST: tl.constexpr,
    OVERSHOOT: tl.constexpr,
    ZERO_FITS: tl.constexpr,
    EXTENT: tl.constexpr,
    WIDE: tl.constexpr,
    SATURATE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Solve BLOCK groups: scale and zero as STORAGE holds them, what to multiply by for codes, and 1 in `flags` if all
    are finite."""
    pid = tl.program_id(0)
    group = pid * BLOCK + tl.arange(0, BLOCK)
    # Beyond the last group the last one again: what is written twice is the same.
    group = tl.minimum(group, groups - 1)
    if WIDE:
        group = group.to(tl.int64)
    tiles = load_tiles(W, group, groups, origin, C, T, GS, AXIS)
    low, high, finite = ends(tiles, T)
    tl.store(flags + pid, tl.min(finite.to(tl.int32), 0))
    _, unit, fallback_zero = min_max(low, high, MAX_CODE, STORAGE, False)
    middle = MAX_CODE / 2 - fallback_zero
    centre = (middle * unit)[:, None]
    inverse_unit = _reciprocal(unit)[:, None]
    centred = ()
    for t in tl.static_range(T):
        centred += (only_live((tiles[t] - centre) * inverse_unit, t, C, GS),)
    total = centred[0]
    for t in tl.static_range(1, T):
        total += centred[t]
    total = tl.sum(total, 1)
    mean = total * (1.0 / GS)
    s, b = _search(
        centred,
        starts,
        total,
        mean,
        rint(
            mean + MAX_CODE / 2
        ),  # the code of the mean: where a group with an outlier has nearly all its codes
        SCALES,
        OFFSETS,
        FITS_PER_OFFSET,
        FITS_OF_BEST,
        OVERSHOOT,
        C,
        T,
        GS,
        MAX_CODE,
        SATURATE,
        INTERPRETED,
    )
    # Read again, from the cache: registers are better used for the search. The origin is another argument, or the
    # compiler would keep all addresses in registers instead.
    tiles = load_tiles(W, group, groups, same_origin, C, T, GS, AXIS)
    scale, zero, error, limit = _store(
        tiles,
        unit,
        fallback_zero,
        s * unit,
        -((b + middle) / s),
        ZERO_FITS,
        STORAGE,
        C,
        T,
        GS,
        MAX_CODE,
        INTERPRETED,
    )
    # Codes are those nearest before the scale is extended.
    tl.store(inverse_out + group, _reciprocal(scale))
    tl.store(zero_out + group, zero)
    scale = _extend(tiles, unit, scale, zero, error, limit, EXTENT, STORAGE, C, T, GS, MAX_CODE, INTERPRETED)
    tl.store(scale_out + group, scale)
