"""Dequantisation as a call of its own: the library's packed codes in, a float tensor out."""

from __future__ import annotations

import torch
from torch import Tensor

from hqq.core.bitpack import FORMAT_OF_BITS, SUPPORTED_BITS
from hqq.core.qtensor import QTensor
from hqq.errors import ConfigError
from hqq.kernels import dequant_op
from hqq.kernels.dequant_config import config_of_block
from hqq.kernels.dequant_plan import Stat, inline_stat


def dequantize(
    W_q: Tensor,
    scale: Tensor | QTensor,
    zero: Tensor | QTensor,
    *,
    nbits: float,
    shape: tuple[int, ...],
    group_size: int | None = 64,
    axis: int = 1,
    packing: str | None = None,
    channel_wise: bool = True,
    compute_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    block_size: int | None = None,
    config: tuple[int, ...] | None = None,
    autotune: bool = False,
) -> Tensor:
    """Return `(W_q - zero) * scale` of `shape`: a Triton kernel on CUDA, the torch reference elsewhere.

    Bit for bit the result of `hqq.core.qtensor.dequantize`: the difference and the product are each rounded, to the
    dtypes that codes in `compute_dtype`, zero and scale promote to.

    Args:
        W_q: packed codes, [ceil(rows / fields), columns] for the grouped matrix [rows, columns], contiguous; uint8, or
            int32 for 3 bit, or any float dtype that views these bytes.
        scale, zero: one value for each group, any shape of that many, float16, bfloat16 or float32; or, where they are
            quantised, a QTensor. Not contiguous ones are copied first.
        nbits, shape, group_size, axis, channel_wise: see `QSpec`; N-D shapes and None (whole channels) are taken.
        packing: name of the pack format; None means the one of `nbits`.
        compute_dtype: dtype the arithmetic starts in; None means scale's.
        out_dtype: dtype of the result; None means what the arithmetic gives.
        block_size: packed elements that a program takes at a time, a power of two; None lets the library choose.
        config: the numbers of `hqq.kernels.dequant_config.Config`, at least the first three (block size, warps, tiles
            per program), for those who measured; instead of block_size.
        autotune: measure the candidate tile sizes at the first call for this shape on this GPU, and keep the winner on
            disk. Never under CUDA-graph capture, where the choice falls back to what is known.

    Raises ConfigError, ShapeError or DtypeError for arguments that do not fit each other, before anything is launched.
    """
    if packing is None:
        if nbits not in SUPPORTED_BITS:
            raise ConfigError(f"got nbits={nbits!r}; expected one of {', '.join(map(str, SUPPORTED_BITS))}")
        packing = FORMAT_OF_BITS[nbits]
    if compute_dtype is None:
        compute_dtype = _dtype_of(scale)
    s, z = inline_stat(scale, compute_dtype), inline_stat(zero, compute_dtype)
    if out_dtype is None:
        out_dtype = torch.promote_types(compute_dtype, _result_dtype(z, compute_dtype))
        out_dtype = torch.promote_types(out_dtype, _result_dtype(s, compute_dtype))
    if block_size is not None:
        if config is not None or autotune:
            raise ConfigError(
                "got block_size together with config or autotune; expected one way to choose tile sizes"
            )
        config = config_of_block(block_size, out_dtype.itemsize)
    if config is not None and autotune:
        raise ConfigError("got config together with autotune; expected one way to choose tile sizes")
    result: Tensor = dequant_op.dequantize_op(
        W_q,
        s.values,
        s.scale,
        s.zero,
        z.values,
        z.scale,
        z.zero,
        float(nbits),
        list(shape),
        group_size,
        axis,
        channel_wise,
        packing,
        s.axis,
        z.axis,
        compute_dtype,
        out_dtype,
        [] if config is None else list(config),
        autotune,
    )
    return result


def dequantize_qtensor(
    q: QTensor,
    compute_dtype: torch.dtype | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    block_size: int | None = None,
    config: tuple[int, ...] | None = None,
    autotune: bool = False,
) -> Tensor:
    """Return the tensor that `q` stands for; arguments and errors as `dequantize`.

    Raises ConfigError for codes that are not packed (`bitpack=False`).
    """
    spec = q.spec
    if spec.packing is None:
        raise ConfigError("got codes that are not packed; expected a pack format, or use QTensor.dequantize")
    return dequantize(
        q.W_q,
        q.scale,
        q.zero,
        nbits=spec.nbits,
        shape=spec.shape,
        group_size=spec.group_size,
        axis=spec.axis,
        packing=spec.packing,
        channel_wise=spec.channel_wise,
        compute_dtype=compute_dtype,
        out_dtype=out_dtype,
        block_size=block_size,
        config=config,
        autotune=autotune,
    )


def _dtype_of(stat: Tensor | QTensor) -> torch.dtype:
    return stat.dtype if isinstance(stat, Tensor) else _dtype_of(stat.scale)


def _result_dtype(stat: Stat, compute_dtype: torch.dtype) -> torch.dtype:
    return stat.values.dtype if stat.scale is None else compute_dtype
