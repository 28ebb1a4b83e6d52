"""How the kernel for few tokens cuts its work: sizes chosen by shape, bits and tokens, as measured on an H200."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch

from hqq.kernels.tile_layout import BLOCK_INPUTS, TILE_ROWS, chunk_blocks

_COLUMNS = (1, 2, 4, 8)
MAX_TOKENS = _COLUMNS[-1]  # at a time
_MOST_WARPS = 16
_LONG = 8192  # inputs
_REGISTERS = 65536  # of a multiprocessor
_FEWEST_REGISTERS = 64  # of a thread; fewer would spill
_MOST_RESIDENT = 8  # blocks on a multiprocessor
_MOST_REGISTERS = 255  # of a thread
_OTHER_REGISTERS = 36  # for addresses, positions and what is under way


class GemvConfig(NamedTuple):
    """How the kernel cuts its work.

    tiles: row tiles (16 outputs) that a warp multiplies at a time. warps: of a block; they share the inputs.
    blocks: blocks of 64 inputs that a warp has at a time. per_sm: thread blocks for each multiprocessor.
    resident: thread blocks that registers must suffice for; more than per_sm leaves room for the next kernel, whose
    first weights can then arrive while this one ends.
    """

    tiles: int
    warps: int
    blocks: int
    per_sm: int
    resident: int


class GemvWork(NamedTuple):
    """What a launch computes, as far as its configuration depends on it; see `launch_gemv` for the last two."""

    dtype: torch.dtype
    bits: int
    axis: int
    group_size: int
    N: int
    K: int
    tokens: int
    normed: bool = False
    gated: bool = False


def columns(tokens: int) -> int:
    """Return how many tokens at a time the kernel that takes `tokens` is compiled for."""
    return next((size for size in _COLUMNS if size >= tokens), MAX_TOKENS)


class _Cut(NamedTuple):
    """What is chosen; warps and resident blocks follow from the number of inputs."""

    tiles: int
    blocks: int
    per_sm: int = 1
    most_warps: int = _MOST_WARPS


def choose_gemv(work: GemvWork, multiprocessors: int) -> GemvConfig:
    """Return the configuration for `work`, by what was fastest for products like it; see also `candidates`."""
    choose = _cut_rows if work.axis == 1 else _cut_columns
    cut = choose(work, columns(work.tokens), -(-work.N // TILE_ROWS) / multiprocessors)
    if work.gated:
        cut = cut._replace(tiles=2)  # one of the gate, one of what it is for
    return _fitted(work, cut)


def _cut_rows(work: GemvWork, tokens: int, row_tiles: float) -> _Cut:
    """The choice for groups along the inputs; `row_tiles` are those of a multiprocessor."""
    small_groups = work.group_size < BLOCK_INPUTS  # a block has several, with scales of their own
    if small_groups and tokens > 2:
        return _Cut(1, 2)
    if row_tiles < 4:  # so few that it matters how soon the first codes have arrived
        if work.K <= _LONG and row_tiles > 2 and tokens == 1 and work.bits == 4 and not small_groups:
            return _Cut(1, 8, per_sm=2, most_warps=8)
        if tokens == 8 and work.K > _LONG:
            return _Cut(2, 2)
        if tokens > 1 or work.K <= _LONG:
            return _Cut(1, 4)
        return _Cut(1, 4, per_sm=2) if work.bits == 4 else _Cut(1, 8)
    if tokens == 8:
        return _Cut(1, 4, per_sm=2, most_warps=8)
    if tokens == 2 and not small_groups:
        return _Cut(2, 4, per_sm=2, most_warps=8)
    if small_groups or (tokens > 1 and work.bits > 2):
        return _Cut(2, 2)
    return _Cut(2, 4)


def _cut_columns(work: GemvWork, tokens: int, row_tiles: float) -> _Cut:
    """The choice for groups along the outputs: scaling x costs as much for one row tile as for four."""
    if tokens == 8:
        return _Cut(2, 4)
    few, long = row_tiles <= 2, work.K > _LONG
    blocks = 4 if tokens == 1 or work.bits <= 2 else 2
    if tokens == 1 and work.bits == 1 and (long or not few):
        blocks = 8
    if few:
        return _Cut(2, 4 if tokens == 4 and not long else blocks)
    if work.bits == 8:
        return _Cut(2, blocks)
    return _Cut(4, blocks) if row_tiles <= 4 else _Cut(4, blocks, per_sm=2, most_warps=8)


def candidates(work: GemvWork, multiprocessors: int) -> list[GemvConfig]:
    """Return the configurations worth measuring for `work`, the chosen one first."""
    found = [choose_gemv(work, multiprocessors)]
    for tiles, blocks, (per_sm, most_warps) in product((1, 2, 4), (2, 4, 8), ((1, 16), (2, 8), (2, 16))):
        config = _fitted(work, _Cut(tiles, blocks, per_sm, most_warps))
        possible = config.tiles == 2 or not work.gated
        if possible and config not in found and registers(work, config) <= available_registers(config):
            found.append(config)
    return found


def available_registers(config: GemvConfig) -> int:
    """Return how many registers a thread can have where so many blocks are to be resident."""
    return min(_MOST_REGISTERS, _REGISTERS // (32 * config.warps * config.resident))


def registers(work: GemvWork, config: GemvConfig) -> int:
    """Return about how many registers a thread needs, as counted in compiled kernels; with fewer some are spilled."""
    tokens = columns(work.tokens)
    token_columns = max(1, tokens // 4)
    held = -(-config.blocks * tokens // 4) if tokens < 4 else config.blocks  # blocks that a lane holds x of
    codes = config.tiles * config.blocks * work.bits
    sums = 6 * config.tiles * token_columns
    return _OTHER_REGISTERS + codes + sums + 4 * held * token_columns


def _fitted(work: GemvWork, cut: _Cut) -> GemvConfig:
    """Return a configuration whose warps divide the inputs evenly and whose row tiles share what they must."""
    tiles = cut.tiles
    members = work.group_size // TILE_ROWS if work.axis == 0 else tiles
    while members % tiles:  # axis=0: all row tiles of a warp have one group's scales
        tiles //= 2
    blocks = max(cut.blocks, chunk_blocks(work.bits))
    slices = -(-work.K // (blocks * BLOCK_INPUTS))
    sweeps = -(-slices // cut.most_warps)
    warps = -(-slices // sweeps)
    # Small weights fill a multiprocessor with more blocks instead.
    per_sm = max(cut.per_sm, min(_MOST_RESIDENT, _MOST_WARPS // warps))
    resident = min(per_sm, _REGISTERS // (32 * warps * _FEWEST_REGISTERS))
    return GemvConfig(tiles, warps, blocks, per_sm, resident)
