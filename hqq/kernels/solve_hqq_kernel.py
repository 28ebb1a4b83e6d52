"""The half-quadratic solver as kernels: what `hqq.core.solvers.half_quadratic` does, without the host in between.

When to stop is decided for the whole tensor, which no program sees. So `iterate_kernel` runs all iterations, keeps the
zeros of each and adds up its error; `total_kernel` adds the programs' errors in a fixed order; `pick_kernel` finds the
iteration that failed to improve them, and takes its zeros.
"""

# Written in Triton's language, which is not quite Python: branches on constants choose what is compiled.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from hqq.kernels.solve_lattice import min_max
from hqq.kernels.solve_tiles import ends, exact_codes, load_tiles, only_live


@triton.jit
def _shrunk(residual, LP_NORM: tl.constexpr, BETA: tl.constexpr):
    """sign(x) * max(|x| - |x|^(p-1) / beta, 0)."""
    size = tl.abs(residual)
    power = tl.exp2(tl.log2(tl.maximum(size, 1e-30)) * (LP_NORM - 1.0))
    kept = tl.maximum(size - power * (1.0 / BETA), 0.0)
    return tl.where(residual < 0.0, -kept, kept)


@triton.jit
def _step(
    tiles,
    zero,
    scale,
    inverse,
    SHRINK: tl.constexpr,
    LP_NORM: tl.constexpr,
    BETA: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    GS: tl.constexpr,
    MAX_CODE: tl.constexpr,
):
    """One iteration on `tiles` = W * inverse: the sum of |W - W_r| of each group, and its new zero."""
    z = zero[:, None]
    error, drift = tl.zeros(tiles[0].shape, tl.float32), tl.zeros(tiles[0].shape, tl.float32)
    for t in tl.static_range(T):
        difference = tiles[t] - exact_codes(tiles[t], z, MAX_CODE)
        residual = difference + z
        error += only_live(tl.abs(residual), t, C, GS)
        if SHRINK:
            difference -= _shrunk(residual * scale[:, None], LP_NORM, BETA) * inverse[:, None]
        drift += only_live(difference, t, C, GS)
    return tl.sum(error, 1) * scale, tl.sum(drift, 1) * (-1.0 / GS)


@triton.jit
def _iterate(
    tiles,
    zero,
    scale,
    inverse,
    low,
    high,
    group,
    live,
    history,
    errors,
    groups,
    ITERATIONS: tl.constexpr,
    SHRINK: tl.constexpr,
    LP_NORM: tl.constexpr,
    BETA: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    GS: tl.constexpr,
    MAX_CODE: tl.constexpr,
):
    """Run all iterations; return a bound of the largest residual met.

    A residual is half a step within the lattice, and outside it the distance from its end.
    """
    worst = scale * 0.5
    for _ in range(ITERATIONS):
        outside = tl.maximum(-zero * scale - low, high - (MAX_CODE - zero) * scale)
        worst = tl.maximum(worst, outside)
        error, zero = _step(tiles, zero, scale, inverse, SHRINK, LP_NORM, BETA, C, T, GS, MAX_CODE)
        tl.store(history + group, zero)
        tl.store(errors, tl.sum(tl.where(live, error, 0.0), 0))
        history += groups
        errors += tl.num_programs(0)
    return worst


@triton.jit(do_not_specialize=["origin"])
def iterate_kernel(
    W,
    scale_out,
    inverse_out,
    history,
    errors,
    flags,
    groups,
    origin,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    GS: tl.constexpr,
    AXIS: tl.constexpr,
    MAX_CODE: tl.constexpr,
    STORAGE: tl.constexpr,
    ROUND_ZERO: tl.constexpr,
    ITERATIONS: tl.constexpr,
    LP_NORM: tl.constexpr,
    BETA: tl.constexpr,
    LARGEST_UNSHRUNK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Iterate on BLOCK groups: scale, 1 / scale, zeros [ITERATIONS, groups] and errors [ITERATIONS, programs].

    Residuals up to LARGEST_UNSHRUNK shrink to nothing, for which no power is needed. 1 in `flags`: all are finite.
    """
    pid = tl.program_id(0)
    group = pid * BLOCK + tl.arange(0, BLOCK)
    live = group < groups
    # Beyond the last group the last one again: what is written twice is the same.
    group = tl.minimum(group, groups - 1)
    if WIDE:
        group = group.to(tl.int64)
    tiles = load_tiles(W, group, groups, origin, C, T, GS, AXIS)
    low, high, finite = ends(tiles, T)
    tl.store(flags + pid, tl.min(finite.to(tl.int32), 0))
    inverse, scale, zero = min_max(low, high, MAX_CODE, STORAGE, ROUND_ZERO)
    tl.store(scale_out + group, scale)
    tl.store(inverse_out + group, inverse)
    scaled = ()
    for t in tl.static_range(T):
        scaled += (tiles[t] * inverse[:, None],)
    worst = _iterate(
        scaled,
        zero,
        scale,
        inverse,
        low,
        high,
        group,
        live,
        history,
        errors + pid,
        groups,
        ITERATIONS,
        False,
        LP_NORM,
        BETA,
        C,
        T,
        GS,
        MAX_CODE,
    )
    # Rare in trained weights. What was written is written again.
    if tl.max(worst, 0) > LARGEST_UNSHRUNK:
        _iterate(
            scaled,
            zero,
            scale,
            inverse,
            low,
            high,
            group,
            live,
            history,
            errors + pid,
            groups,
            ITERATIONS,
            True,
            LP_NORM,
            BETA,
            C,
            T,
            GS,
            MAX_CODE,
        )


@triton.jit
def total_kernel(errors, totals, programs, CHUNK: tl.constexpr):
    """Add up one row of `errors` [iterations, programs] in double precision; one program for each row."""
    row = tl.program_id(0)
    place = tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], tl.float64)
    for first in range(0, programs, CHUNK):
        keep = first + place < programs
        total += tl.load(errors + row * programs + first + place, mask=keep, other=0.0).to(tl.float64)
    tl.store(totals + row, tl.sum(total, 0))


@triton.jit
def pick_kernel(
    history,
    totals,
    zero_out,
    groups,
    numel,
    ITERATIONS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Copy the zeros of the first iteration whose mean error is not below that of the one before, or of the last."""
    i = tl.arange(0, PADDED)
    known = i < ITERATIONS
    # The original compares float32 means: anything finer would go on where it stops.
    mean = (tl.load(totals + i, mask=known, other=0.0) / numel).to(tl.float32)
    before = (tl.load(totals + i - 1, mask=known & (i > 0), other=float("inf")) / numel).to(tl.float32)
    failed = ((mean < before) == 0) & known
    stop = tl.min(tl.where(failed, i, ITERATIONS - 1), 0)
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = group < groups
    if WIDE:
        stop = stop.to(tl.int64)
    tl.store(zero_out + group, tl.load(history + stop * groups + group, mask=keep), mask=keep)
