"""Products of a tiled weight with 17 to some hundreds of tokens: choosing and launching cuda/gemm.cu (Hopper)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hqq.kernels.cuda import Kernel, unavailable_reason
from hqq.kernels.device import ELEMENTS, multiprocessors
from hqq.kernels.tile_layout import BLOCK_INPUTS, chunk_blocks
from hqq.kernels.tiled_gemm_config import GemmConfig, choose, fitted

_WARPS, _THREADS = 8, 384
_ALIGNMENT = 256
# The kernel multiplies units of work by workers in 32 bits.
_MOST_SHARES = (1 << 32) - 1


def gemm_unavailable_reason(device: torch.device) -> str | None:
    """Return None if the fused GEMM runs on `device`, else a sentence that says why not."""
    reason = unavailable_reason(device)
    if reason is not None:
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"the fused GEMM is for compute capability 9.0; {device} has {major}.{minor}"
    return None


@dataclass(frozen=True)
class GemmPlan:
    """One launch: blocks of the grid, and what lies where in the workspace (bytes)."""

    workers: int
    arranged_bytes: int
    flags_at: int
    partial_at: int
    workspace_bytes: int


def tiled_gemm(
    x: Tensor,
    codes: Tensor,
    meta: Tensor,
    rows: Tensor,
    bits: int,
    axis: int,
    group_size: int,
    N: int,
    K: int,
    bias: Tensor | None,
    out: Tensor,
    config: GemmConfig | None = None,
) -> None:
    """Write `x @ W^T + bias` to `out`: x [M, K] and out [M, N] contiguous, the weight as in `TiledWeight`.

    Sums are fp32, in an order that depends on shapes and configuration only. Every call takes workspace of its own from
    torch's allocator, so calls on several streams do not meet. The caller has checked shapes, dtypes and devices.
    """
    M = x.shape[0]
    device = x.device.index
    group = 0 if axis == 1 and meta.shape[1] == 1 else group_size
    if config is None:
        config = choose(M, N, K, bits, multiprocessors(device))
    config = _fitted(config, bits, axis, group, K)
    product, arrange = _kernels(ELEMENTS[meta.dtype], bits, axis, group, config)
    tiles, blocks = codes.shape[0], codes.shape[1] * chunk_blocks(bits)
    plan = _plan(M, tiles, blocks, config, multiprocessors(device))
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=x.device)
    arranged = workspace.data_ptr()
    flags, partial = arranged + plan.flags_at, arranged + plan.partial_at
    pieces = max(M * blocks * 8, plan.workers)
    arrange.launch(
        device,
        (-(-pieces // 256), 1, 1),
        (256, 1, 1),
        (x.data_ptr(), arranged, flags, M, K, blocks, plan.workers),
        pdl=True,
    )
    product.launch(
        device,
        (plan.workers, 1, 1),
        (_THREADS, 1, 1),
        (
            arranged,
            codes.data_ptr(),
            meta.data_ptr(),
            rows.data_ptr(),
            bias.data_ptr() if bias is not None else 0,
            out.data_ptr(),
            partial,
            flags,
            M,
            N,
            tiles,
            blocks,
            meta.shape[1],
        ),
        shared=config.shared_bytes(bits, axis, group),
        pdl=True,
        cluster=(config.split, 1, 1) if config.split > 1 else None,
    )


_fitted = cache(fitted)


@cache
def _plan(M: int, tiles: int, blocks: int, config: GemmConfig, multiprocessors: int) -> GemmPlan:
    token_blocks = -(-M // config.tokens)
    output_tiles = -(-tiles // (_WARPS * config.blocks)) * token_blocks
    units = output_tiles * -(-blocks // config.span)
    if config.split:
        workers = output_tiles * config.split
    else:
        workers = min(multiprocessors * config.resident, units, _MOST_SHARES // units)
    arranged = token_blocks * config.tokens * blocks * BLOCK_INPUTS * 2
    flags_at = _aligned(arranged)
    partial_at = flags_at + _aligned(4 * workers)
    shared_tiles = config.split == 0 and output_tiles % workers != 0
    partial = workers * config.blocks * config.tokens * 128 * 4 if shared_tiles else 0
    return GemmPlan(workers, arranged, flags_at, partial_at, partial_at + partial)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@cache
def _kernels(dtype: str, bits: int, axis: int, group: int, config: GemmConfig) -> tuple[Kernel, Kernel]:
    defines = config.defines(dtype, bits, axis, group)
    return (
        Kernel("gemm.cu", "tiled_gemm", "PPPPPPPPiiiii", defines),
        Kernel("gemm.cu", "arrange_tokens", "PPPiiii", defines),
    )
