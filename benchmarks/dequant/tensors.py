"""Random quantised tensors on the GPU, drawn there: nothing is solved, nothing is zero."""

from __future__ import annotations

import torch
from torch import Tensor

from hqq.core.bitpack import FORMAT_OF_BITS, FORMATS, max_code
from hqq.core.qtensor import QSpec, QTensor


def random_qtensor(
    nbits: float,
    shape: tuple[int, ...],
    group_size: int | None,
    axis: int,
    dtype: torch.dtype,
    *,
    quantised: bool = False,
    device: str = "cuda",
) -> QTensor:
    """Return random packed codes with random scale and zero, those quantised as BaseQuantizeConfig has it on demand."""
    spec = QSpec(nbits, shape, group_size, axis, FORMAT_OF_BITS[nbits])
    fmt = FORMATS[FORMAT_OF_BITS[nbits]]
    # Every bit pattern is a valid one, but for the two bits that ten fields of 3 leave free in an int32.
    top = 2**30 if fmt.dtype == torch.int32 else 256
    W_q = torch.randint(1, top, spec.packed_shape, device=device, dtype=fmt.dtype)
    stat_shape = spec.grouping.stat_shape
    if not quantised:
        return QTensor(
            W_q,
            _between(stat_shape, 0.01, 0.02, dtype, device),
            _zeros(stat_shape, nbits, dtype, device),
            spec,
        )
    count = spec.grouping.num_groups
    length = next(g for g in range(128, 0, -1) if count % g == 0)
    outer = QSpec(8, stat_shape, length, 0, "8bit_u8")
    whole = QSpec(8, stat_shape, None, 0, "8bit_u8", channel_wise=False)
    scale = _codes(outer, _between(outer.grouping.stat_shape, 1e-4, 2e-4, dtype, device))
    zero = _codes(whole, _between((), 0.01, 0.02, dtype, device))
    return QTensor(W_q, scale, zero, spec)


def _codes(spec: QSpec, scale: Tensor) -> QTensor:
    codes = torch.randint(1, 256, spec.grouping.matrix_shape, device=scale.device, dtype=torch.uint8)
    zero = _between(tuple(scale.shape), 10, 100, scale.dtype, str(scale.device))
    return QTensor(codes, scale, zero, spec)


def _between(shape: tuple[int, ...], low: float, high: float, dtype: torch.dtype, device: str) -> Tensor:
    return (torch.rand(shape, device=device) * (high - low) + low).to(dtype)


def _zeros(shape: tuple[int, ...], nbits: float, dtype: torch.dtype, device: str) -> Tensor:
    return _between(shape, 0.3, max_code(nbits), dtype, device)


def moved_bytes(q: QTensor, out_dtype: torch.dtype) -> int:
    """Return the least bytes a dequantisation moves: codes, scale and zero in, the tensor out, each once."""
    return q.nbytes + q.spec.grouping.numel * out_dtype.itemsize
