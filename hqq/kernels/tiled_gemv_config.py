"""How the kernel for few tokens cuts its work: sizes chosen by shape, bits and tokens, as measured on an H200."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch

from hqq.kernels.tile_layout import BLOCK_INPUTS, TILE_ROWS, chunk_blocks

_COLUMNS = (1, 2, 4, 8, 16)
_MOST_WARPS = 16
_FEW_ROW_TILES = 4  # for each multiprocessor
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
    return next((size for size in _COLUMNS if size >= tokens), _COLUMNS[-1])


def choose_gemv(work: GemvWork, multiprocessors: int) -> GemvConfig:
    """Return the configuration for `work`; `candidates` has those it was chosen from."""
    row_tiles = -(-work.N // TILE_ROWS)
    few = row_tiles < _FEW_ROW_TILES * multiprocessors
    tokens = columns(work.tokens)
    small_groups = (
        work.axis == 1 and work.group_size < BLOCK_INPUTS
    )  # a block has several, with scales of their own
    if tokens == 16 or (small_groups and tokens > 2):
        tiles, blocks, per_sm = (1, 2, 2)  # x of so many tokens takes most registers
    elif tokens == 8:
        tiles, blocks, per_sm = (1, 4, 2) if work.axis == 1 else (2, 2, 1)
    elif tokens > 1:
        tiles, blocks, per_sm = (1 if work.bits == 8 else 2, 4, 1)
    elif work.axis == 0:
        # Scaling x costs as much for one row tile as for four.
        tiles, blocks, per_sm = (2 if work.bits == 8 else 4, 4, 1)
    elif few:
        tiles = 1 if work.bits == 4 else 2
        blocks, per_sm = (8 if work.K > _LONG and work.bits < 8 else 4), 1
    elif work.bits == 8 or small_groups:
        tiles, blocks, per_sm = (2, 4, 1)
    elif work.bits == 4:
        tiles, blocks, per_sm = (1, 8, 3)
    else:
        tiles, blocks, per_sm = (2, 8, 2)
    if work.gated:
        tiles = 2  # one of the gate, one of what it is for
    return _fitted(work, tiles, blocks, per_sm, _MOST_WARPS if per_sm == 1 else _MOST_WARPS // 2)


def candidates(work: GemvWork, multiprocessors: int) -> list[GemvConfig]:
    """Return the configurations worth measuring for `work`, the chosen one first."""
    found = [choose_gemv(work, multiprocessors)]
    for tiles, blocks, per_sm, most_warps in product((1, 2, 4), (2, 4, 8), (1, 2, 3), (8, 16)):
        config = _fitted(work, tiles, blocks, per_sm, most_warps)
        for resident in (config.resident, min(config.per_sm + 1, _MOST_RESIDENT)):
            config = config._replace(resident=resident)
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


def _fitted(work: GemvWork, tiles: int, blocks: int, per_sm: int, most_warps: int) -> GemvConfig:
    """Return a configuration whose warps divide the inputs evenly and whose row tiles share what they must."""
    members = work.group_size // TILE_ROWS if work.axis == 0 else tiles
    while members % tiles:  # axis=0: all row tiles of a warp have one group's scales
        tiles //= 2
    blocks = max(blocks, chunk_blocks(work.bits))
    slices = -(-work.K // (blocks * BLOCK_INPUTS))
    sweeps = -(-slices // most_warps)
    warps = -(-slices // sweeps)
    # Small weights fill a multiprocessor with more blocks instead.
    per_sm = max(per_sm, min(_MOST_RESIDENT, _MOST_WARPS // warps))
    resident = min(per_sm, _REGISTERS // (32 * warps * _FEWEST_REGISTERS))
    return GemvConfig(tiles, warps, blocks, per_sm, resident)
