"""The min-max lattices of a weight as a kernel: what `hqq.core.solvers.min_max.min_max_lattice` does."""

# Written in Triton's language, which is not quite Python: branches on constants choose what is compiled.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from hqq.kernels.solve_lattice import min_max
from hqq.kernels.solve_tiles import ends, load_tiles


@triton.jit(do_not_specialize=["origin"])
def min_max_kernel(
    W,
    scale_out,
    zero_out,
    inverse_out,
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
    WIDE: tl.constexpr,
):
    """Scale, zero and inverse scale of BLOCK groups, and 1 in `flags` if all are finite."""
    pid = tl.program_id(0)
    group = pid * BLOCK + tl.arange(0, BLOCK)
    # Beyond the last group the last one again: what is written twice is the same.
    group = tl.minimum(group, groups - 1)
    if WIDE:
        group = group.to(tl.int64)
    tiles = load_tiles(W, group, groups, origin, C, T, GS, AXIS)
    low, high, finite = ends(tiles, T)
    tl.store(flags + pid, tl.min(finite.to(tl.int32), 0))
    inverse, scale, zero = min_max(low, high, MAX_CODE, STORAGE, ROUND_ZERO)
    tl.store(scale_out + group, scale)
    tl.store(zero_out + group, zero)
    tl.store(inverse_out + group, inverse)
