"""Products of few tokens with a tiled weight: configuration and launch of cuda/gemv.cu."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from torch import Tensor

from hqq.errors import ConfigError
from hqq.kernels.cuda import Kernel
from hqq.kernels.device import ELEMENTS, multiprocessors
from hqq.kernels.tile_layout import BLOCK_INPUTS, TILE_ROWS, chunk_blocks
from hqq.kernels.tiled_gemv_config import MAX_TOKENS, GemvConfig, GemvWork, columns

_SHARED_BYTES = 96 * 1024


class Norm(NamedTuple):
    """An RMS norm of x in front of a product: weight [K] in x's dtype, and what is added to the mean square."""

    weight: Tensor
    eps: float


def launch_gemv(
    work: GemvWork,
    config: GemvConfig,
    x: Tensor,
    codes: Tensor,
    meta: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    out: Tensor,
    norm: Norm | None = None,
    residual: Tensor | None = None,
) -> None:
    """Write `x @ W^T + bias + residual` to `out`: x [M, K], out and residual [M, N].

    Every MAX_TOKENS tokens go over the weight once more.

    All are contiguous and 16-byte aligned. With `work.normed`, x is what `norm` makes of it. With `work.gated`, the
    first half of the outputs is a gate: `silu(gate) * other`, of N / 2, takes the place of the products.

    Raises ConfigError for a configuration that this weight cannot have.
    """
    _check(work, config)
    blocks = codes.shape[1] * chunk_blocks(work.bits)
    tiles = codes.shape[0]
    sweeps = -(-blocks // (config.warps * config.blocks))
    row_groups = -(-tiles // config.tiles)
    grid = min(row_groups, multiprocessors(x.device.index) * config.per_sm)
    tokens = columns(work.tokens)
    row_sums = 4 * max(tokens, 4)  # bytes: a float for each token and slot
    per_group = config.warps * TILE_ROWS * config.tiles * row_sums
    # Sums of x for each set of slots, or scales and zeros of a row tile; and the sums of squares.
    inputs = _slot_sets(work, config, tokens) * 2 * row_sums if work.axis == 1 else config.blocks * 256
    inputs = config.warps * (inputs + (4 * tokens if work.normed else 0))
    batch = max(1, min(-(-row_groups // grid), (_SHARED_BYTES - inputs) // per_group))
    groups = work.group_size // TILE_ROWS if work.axis == 0 else meta.shape[1]
    optional = (bias, norm.weight if norm else None, residual)
    kernel(work, config).launch(
        x.device.index,
        (grid, -(-x.shape[0] // MAX_TOKENS), 1),
        (32 * config.warps, 1, 1),
        (
            *(tensor.data_ptr() for tensor in (x, codes, meta, rows)),
            *(0 if tensor is None else tensor.data_ptr() for tensor in optional),
            out.data_ptr(),
            x.shape[0],
            work.N,
            work.K,
            tiles,
            blocks,
            groups,
            sweeps,
            batch,
            norm.eps if norm else 0.0,
        ),
        shared=batch * per_group + inputs,
        pdl=True,
    )


def _check(work: GemvWork, config: GemvConfig) -> None:
    members = work.group_size // TILE_ROWS
    if config.blocks % chunk_blocks(work.bits) or (work.axis == 0 and members % config.tiles):
        raise ConfigError(
            f"got {config} for {work.bits} bits, axis={work.axis}, group_size={work.group_size}; expected blocks in "
            f"multiples of {chunk_blocks(work.bits)}, and tiles that divide {members} with axis=0"
        )
    if work.gated and (config.tiles != 2 or work.axis == 0 or work.N % 2):
        raise ConfigError(f"got {config} for {work}; a gate takes axis=1, an even N, and tiles=2")


def kernel(work: GemvWork, config: GemvConfig) -> Kernel:
    """Return the compiled variant for `work`."""
    # Groups down the outputs and whole rows make no difference to the code, nor does the number of blocks.
    group = 0 if work.axis == 0 or work.group_size == work.K else work.group_size
    work = work._replace(group_size=group, N=0, K=0, tokens=columns(work.tokens))
    return _kernel(work, config._replace(per_sm=0))


@cache
def _kernel(work: GemvWork, config: GemvConfig) -> Kernel:
    defines = {
        "ELEMENT": ELEMENTS[work.dtype],
        "CODE_BITS": work.bits,
        "AXIS": work.axis,
        "GROUP": work.group_size,
        "TOKENS": work.tokens,
        "TILES": config.tiles,
        "WARPS": config.warps,
        "BLOCKS": config.blocks,
        "RESIDENT": config.resident,
        "NORMED": int(work.normed),
        "GATED": int(work.gated),
    }
    return Kernel("gemv.cu", "gemv", "PPPPPPPPiiiiiiiif", defines)


def _slot_sets(work: GemvWork, config: GemvConfig, tokens: int) -> int:
    """Return how many sets of slots the inputs of a warp make up (SETS in the kernel)."""
    parts = max(1, BLOCK_INPUTS // work.group_size)
    slots = max(1, 4 // tokens)
    return -(-config.blocks * parts // slots)
