"""From a tiled weight to its matrix [N, K] on a CUDA device: for products with many tokens, and for gradients."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from hqq.kernels.cuda import Kernel
from hqq.kernels.device import ELEMENTS
from hqq.kernels.tile_layout import chunk_blocks

_WARPS = 8


def tile_dequantize(
    codes: Tensor,
    meta: Tensor,
    rows: Tensor,
    bits: int,
    axis: int,
    group_size: int,
    N: int,
    K: int,
    out: Tensor | None = None,
) -> Tensor:
    """Return `(W_q - zero) * scale` [N, K] in the dtype of `meta`, bit for bit what `dequantize_tiles` returns.

    The tensors are those of a `TiledWeight` on a CUDA device; `out` is a contiguous tensor to write to.
    """
    if out is None:
        out = meta.new_empty((N, K))
    device = codes.device.index
    tiles, chunks = codes.shape[0], codes.shape[1]
    group = 0 if axis == 1 and meta.shape[1] == 1 else group_size
    run = _run(bits, axis, out.nbytes)
    kernel = _kernel(ELEMENTS[meta.dtype], bits, axis, group, run, K % 8 != 0)
    runs = -(-chunks * chunk_blocks(bits) // run)
    kernel.launch(
        device,
        (-(-tiles * runs // _WARPS), 1, 1),
        (32 * _WARPS, 1, 1),
        (codes.data_ptr(), meta.data_ptr(), rows.data_ptr(), out.data_ptr(), K, tiles, chunks, meta.shape[1]),
    )
    return out


def _run(bits: int, axis: int, nbytes: int) -> int:
    """Return how many blocks of 64 inputs a warp takes, as measured on an H200."""
    if axis == 0 or bits == 4 or nbytes <= 64 << 20:
        return 8
    return max(2, chunk_blocks(bits))


@cache
def _kernel(dtype: str, bits: int, axis: int, group: int, run: int, ragged: bool) -> Kernel:
    defines = {
        "HQQ_T": dtype,
        "HQQ_BITS": bits,
        "HQQ_AXIS": axis,
        "HQQ_GROUP": group,
        "HQQ_RUN": run,
        "HQQ_RAGGED": ragged,
    }
    return Kernel("tile_dequant.cu", "tile_dequantize", "PPPPiiii", defines)
