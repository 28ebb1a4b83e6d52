"""Random quantised weights for the kernels on tiles, and what they stand for exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from hqq.core.bitpack import FORMAT_OF_BITS, FORMATS, pack
from hqq.core.qtensor import QSpec, QTensor

# Relative to the exact product: x and results in the dtype, sums in fp32.
LIMIT = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def random_qtensor(
    bits: int, N: int, K: int, axis: int, group_size: int | None, dtype: torch.dtype, device: str = "cpu"
) -> QTensor:
    """Return a weight [N, K] of random codes, scales and zeros."""
    spec = QSpec(bits, (N, K), group_size, axis, FORMAT_OF_BITS[bits])
    codes = torch.randint(0, 1 << bits, spec.grouping.matrix_shape, dtype=torch.uint8, device=device)
    stat = spec.grouping.stat_shape
    scale = (0.002 + 0.01 * torch.rand(stat, device=device)).to(dtype)
    zero = (torch.rand(stat, device=device) * ((1 << bits) - 1)).to(dtype)
    return QTensor(pack(codes, FORMATS[FORMAT_OF_BITS[bits]]), scale, zero, spec)


def exact(q: QTensor) -> Tensor:
    """Return the weight in float64, nothing rounded."""
    assert isinstance(q.scale, Tensor)
    assert isinstance(q.zero, Tensor)
    return q.spec.grouping.ungroup((q.codes(torch.uint8).double() - q.zero.double()) * q.scale.double())
