"""A block of groups in registers: how the solver kernels load it, round it and add it up.

A program holds its groups as a tuple of tiles [groups, C], on both axes: tile t has elements t*C to (t+1)*C of every
group. A tuple, since Triton would deal the elements of one wide tile out to neighbouring threads; so a thread keeps a
whole group, or a large part of one, and sums over a group are additions within a thread and at most a few exchanges.
"""

# Written in Triton's language, which is not quite Python: branches on constants choose what is compiled.
# mypy: ignore-errors
# ruff: noqa: RET505

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2^23: floats from there on are 1 apart, so adding it rounds to an integer, ties to even.
MAGIC = tl.constexpr(12582912.0)


@triton.jit
def element(t: tl.constexpr, C: tl.constexpr):
    """Numbers within their group of the elements of tile t, [1, C]."""
    return (t * C + tl.arange(0, C))[None, :]


@triton.jit
def only_live(x, t: tl.constexpr, C: tl.constexpr, GS: tl.constexpr):
    """`x`, zero where tile t reaches beyond the end of a group."""
    if (t + 1) * C > GS:
        return tl.where(element(t, C) < GS, x, 0.0)
    else:
        return x


@triton.jit
def load_tile(
    W, group, groups, origin, t: tl.constexpr, C: tl.constexpr, GS: tl.constexpr, AXIS: tl.constexpr
):
    """Tile t of the groups `group`, as fp32; beyond the end of a group its last element again."""
    k = element(t, C)
    if (t + 1) * C > GS:
        k = tl.minimum(k, GS - 1)
    if AXIS == 1:
        place = group[:, None] * GS + k
    else:
        # Neighbouring threads take neighbouring columns. That origin is 0 the compiler does not know: else it would
        # give several columns to one thread, and deal the rows of one group out to several.
        place = tl.max_contiguous(k.to(group.dtype) * groups + group[:, None] + origin, [group.shape[0], 1])
    return tl.load(W + place).to(tl.float32)


@triton.jit
def load_tiles(
    W,
    group,
    groups,
    origin,
    C: tl.constexpr,
    T: tl.constexpr,
    GS: tl.constexpr,
    AXIS: tl.constexpr,
):
    """All tiles of the groups `group`."""
    tiles = ()
    for t in tl.static_range(T):
        tiles += (load_tile(W, group, groups, origin, t, C, GS, AXIS),)
    return tiles


@triton.jit
def ends(tiles, T: tl.constexpr):
    """Least and greatest element of each group, and whether all are finite."""
    low, high, nothing = tiles[0], tiles[0], tiles[0] - tiles[0]
    for t in tl.static_range(1, T):
        low, high = tl.minimum(low, tiles[t]), tl.maximum(high, tiles[t])
        nothing += tiles[t] - tiles[t]
    # Differences of NaN or infinity with themselves are NaN, and stay so in sums.
    return tl.min(low, 1), tl.max(high, 1), tl.sum(nothing, 1) == 0.0


@triton.jit
def _add3(a, b, c, x, y, z):
    return a + x, b + y, c + z


@triton.jit
def totals(a, b, c, INTERPRETED: tl.constexpr):
    """Three sums over each group."""
    if INTERPRETED:
        return tl.sum(a, 1), tl.sum(b, 1), tl.sum(c, 1)
    else:
        # At once, so that threads meet once.
        return tl.reduce((a, b, c), 1, _add3)


@triton.jit
def exact_codes(scaled, zero, MAX_CODE: tl.constexpr):
    """clamp(round(scaled + zero), 0, MAX_CODE), every operation rounded as the torch reference's."""
    return (tl.minimum(tl.maximum(scaled + zero, 0.0), MAX_CODE) + MAGIC) - MAGIC


@triton.jit
def quick_codes(v, slope, offset, centre, MAX_CODE: tl.constexpr, SATURATE: tl.constexpr):
    """clamp(round(v * slope + offset), 0, MAX_CODE) - centre up to ties; centre holds integers.

    With SATURATE slope and offset come divided by MAX_CODE: saturating to [0, 1] is part of NVIDIA's multiply-add and
    costs nothing, while minimum and maximum run at half rate.
    """
    if SATURATE:
        share = tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;",
            "=f,f,f,f",
            [v, slope, offset],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        return tl.fma(share, MAX_CODE * 1.0, MAGIC) - (centre + MAGIC)
    else:
        return (tl.minimum(tl.maximum(tl.fma(v, slope, offset), 0.0), MAX_CODE) + MAGIC) - (centre + MAGIC)
