"""Block sizes of the solver kernels: the type, the shipped choice, and the candidates that measurements try."""

from __future__ import annotations

from typing import NamedTuple

_WARP = 32
_MOST_WARPS = 16
_VECTOR_BYTES = 16  # the widest load of one thread
_TILE_ROWS = 8
_SHORT = 128


class SolveConfig(NamedTuple):
    """`warps` warps in a program, and about `elements` elements of a group in one thread (powers of two)."""

    warps: int = 4
    elements: int = 64


def shipped(solver: str, axis: int, length: int) -> SolveConfig:
    """Return the configuration that was fastest for this solver, axis and length of groups on an H200."""
    if solver == "hqq" and length <= _SHORT:
        return SolveConfig(1, 64) if axis == 1 else SolveConfig(4, 32)
    return SolveConfig()


class Blocks(NamedTuple):
    """A program has `block` groups in `tiles` tiles of `chunk` elements each, and `warps` warps."""

    block: int
    chunk: int
    tiles: int
    warps: int


def longest_group(elements: int = SolveConfig().elements) -> int:
    """Return the longest group that fits the registers of one program."""
    return _MOST_WARPS * _WARP * elements


def blocks_for(length: int, axis: int, itemsize: int, config: SolveConfig) -> Blocks:
    """Return the blocks for groups of `length` elements of `itemsize` bytes.

    Short groups are one thread's each, or a few neighbouring threads'; a group as long as a channel is a program's.
    """
    share = _power_above(-(-length // config.elements))
    warps = max(config.warps, share // _WARP)
    in_tile = _VECTOR_BYTES // itemsize if axis == 1 else _TILE_ROWS
    chunk = min(in_tile * share, _power_above(length))
    return Blocks(max(1, warps * _WARP // share), chunk, -(-length // chunk), warps)


def candidates() -> list[SolveConfig]:
    """Return the configurations that are worth measuring, the plain one first."""
    return [SolveConfig(w, e) for w in (4, 2, 1, 8) for e in (64, 32, 16)]


def _power_above(count: int) -> int:
    """Return the least power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()
