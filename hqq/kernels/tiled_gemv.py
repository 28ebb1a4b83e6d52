"""Products of few tokens (up to 16) with a tiled weight: configuration and launch of cuda/gemv.cu."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hqq.errors import ConfigError
from hqq.kernels.cuda import Kernel
from hqq.kernels.tile_layout import BLOCK_INPUTS, TILE_ROWS, chunk_blocks
from hqq.kernels.tiled_device import ELEMENTS, multiprocessors
from hqq.kernels.tiled_gemv_config import GemvConfig, GemvWork, columns

MAX_TOKENS = 16
_SHARED_BYTES = 96 * 1024


def launch_gemv(
    work: GemvWork,
    config: GemvConfig,
    x: Tensor,
    codes: Tensor,
    meta: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """Write `x @ W^T + bias` to `out`: x [M, K] and out [M, N] contiguous and 16-byte aligned, M up to MAX_TOKENS.

    Raises ConfigError for a configuration that this weight cannot have.
    """
    members = work.group_size // TILE_ROWS
    if config.blocks % chunk_blocks(work.bits) or (work.axis == 0 and members % config.tiles):
        raise ConfigError(
            f"got {config} for {work.bits} bits, axis={work.axis}, group_size={work.group_size}; expected blocks in "
            f"multiples of {chunk_blocks(work.bits)}, and tiles that divide {members} with axis=0"
        )
    blocks = codes.shape[1] * chunk_blocks(work.bits)
    tiles = codes.shape[0]
    sweeps = -(-blocks // (config.warps * config.blocks))
    row_groups = -(-tiles // config.tiles)
    grid = min(row_groups, multiprocessors(x.device.index) * config.per_sm)
    tokens = columns(work.tokens)
    row_sums = 4 * max(tokens, 4)  # bytes: a float for each token and slot
    per_group = config.warps * (TILE_ROWS * config.tiles + (1 if work.axis == 0 else 0)) * row_sums
    # Sums of x for each set of slots, or scales and zeros of a row tile.
    inputs = config.warps * (_slot_sets(work, config, tokens) * 2 * row_sums if work.axis == 1 else config.blocks * 256)
    batch = max(1, min(-(-row_groups // grid), (_SHARED_BYTES - inputs) // per_group))
    groups = members if work.axis == 0 else meta.shape[1]
    kernel(work.dtype, work.bits, work.axis, _group(work), tokens, config._replace(per_sm=0)).launch(
        x.device.index,
        (grid, 1, 1),
        (32 * config.warps, 1, 1),
        (
            x.data_ptr(),
            codes.data_ptr(),
            meta.data_ptr(),
            rows.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            work.N,
            work.K,
            tiles,
            blocks,
            groups,
            sweeps,
            batch,
        ),
        shared=batch * per_group + inputs,
        pdl=True,
    )


@cache
def kernel(dtype: torch.dtype, bits: int, axis: int, group: int, tokens: int, config: GemvConfig) -> Kernel:
    """Return the compiled variant."""
    defines = {
        "ELEMENT": ELEMENTS[dtype],
        "CODE_BITS": bits,
        "AXIS": axis,
        "GROUP": group,
        "TOKENS": tokens,
        "TILES": config.tiles,
        "WARPS": config.warps,
        "BLOCKS": config.blocks,
        "RESIDENT": config.resident,
    }
    return Kernel("gemv.cu", "gemv", "PPPPPPiiiiiiii", defines)


def _slot_sets(work: GemvWork, config: GemvConfig, tokens: int) -> int:
    """Return how many sets of slots the inputs of a warp make up (SETS in the kernel)."""
    parts = max(1, BLOCK_INPUTS // work.group_size)
    slots = max(1, 4 // tokens)
    return -(-config.blocks * parts // slots)


def _group(work: GemvWork) -> int:
    # Groups down the outputs and whole rows make no difference to the code.
    return 0 if work.axis == 0 or work.group_size == work.K else work.group_size
