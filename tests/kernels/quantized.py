"""Random quantised tensors for the kernels' tests: codes, scale and zero drawn directly, without a solver."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hqq.core.bitpack import FORMAT_OF_BITS, FORMATS, max_code, pack
from hqq.core.qtensor import QSpec, QTensor

# Some releases of torch's own compiler import what another part of torch warns of.
ALLOW_SCRIPT_METHOD = pytest.mark.filterwarnings(
    "ignore:.?torch.jit.script_method.? is deprecated:DeprecationWarning"
)


def random_qtensor(
    rng: torch.Generator,
    device: torch.device,
    *,
    nbits: float,
    shape: tuple[int, ...],
    group_size: int | None = 64,
    axis: int = 1,
    dtype: torch.dtype = torch.float16,
    quant_scale: bool = False,
    quant_zero: bool = False,
    channel_wise: bool = True,
) -> QTensor:
    """Return codes over the whole range, fractional zeros and scales of both signs, each quantised on demand."""
    spec = QSpec(nbits, shape, group_size, axis, FORMAT_OF_BITS[nbits], channel_wise=channel_wise)
    codes = torch.randint(
        0, max_code(nbits) + 1, spec.grouping.matrix_shape, generator=rng, dtype=torch.uint8
    )
    stat_shape = spec.grouping.stat_shape
    top = max_code(nbits)
    scale: Tensor | QTensor = signed(stat_shape, rng).mul_(0.02).to(device, dtype)
    zero: Tensor | QTensor = (torch.rand(stat_shape, generator=rng) * top).to(device, dtype)
    if quant_scale:
        scale = quantised_stat(stat_shape, rng, device, dtype, top=0.02)
    if quant_zero:
        zero = quantised_stat(stat_shape, rng, device, dtype, top=float(top), per_tensor=True)
    return QTensor(pack(codes, FORMATS[FORMAT_OF_BITS[nbits]]).to(device), scale, zero, spec)


def quantised_stat(
    shape: tuple[int, ...],
    rng: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
    *,
    top: float,
    nbits: float = 8,
    axis: int = 0,
    per_tensor: bool = False,
) -> QTensor:
    """Return a statistic of `shape` as codes, by default of 8 bits, whose values reach about `top`."""
    count = torch.Size(shape).numel()
    length = next(g for g in (128, 64, 32, 16, 8, 4, 3, 2, 1) if count % g == 0)
    group_size = None if per_tensor else length
    spec = QSpec(nbits, shape, group_size, axis, FORMAT_OF_BITS[nbits], channel_wise=not per_tensor)
    matrix, outer = spec.grouping.matrix_shape, spec.grouping.stat_shape
    codes = torch.randint(0, max_code(nbits) + 1, matrix, generator=rng, dtype=torch.uint8)
    scale = (signed(outer, rng) * top / max_code(nbits)).to(device, dtype)
    zero = (torch.rand(outer, generator=rng) * max_code(nbits)).to(device, dtype)
    return QTensor(pack(codes, FORMATS[FORMAT_OF_BITS[nbits]]).to(device), scale, zero, spec)


def signed(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Return values between 0.5 and 1 in size, of either sign."""
    size = torch.rand(shape, generator=rng) * 0.5 + 0.5
    return size * (torch.randint(0, 2, shape, generator=rng) * 2 - 1)


def bits_of(x: Tensor) -> Tensor:
    """Return the bit patterns of `x`: equal ones mean equal values, signed zeros told apart."""
    return x.cpu().contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])
