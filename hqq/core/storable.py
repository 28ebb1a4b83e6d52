"""What a compute dtype can and cannot hold of a quantised weight."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from hqq.core.qtensor import QTensor, dequantize
from hqq.errors import QuantizationWarning, WeightError

# Below this, float16 keeps less than three bits of a scale (its numbers are 2^-24 apart there).
_COARSE_FLOAT16 = 2.0**-21


def check_representable(q: QTensor, compute_dtype: torch.dtype, W: Tensor) -> None:
    """Raise WeightError if `q`, which stands for the weight `W`, has values beyond `compute_dtype`'s largest.

    Warns with QuantizationWarning where float16 is too coarse for the scales of very small weights.
    """
    scale, zero = (_cast(stat, compute_dtype) for stat in (q.scale, q.zero))
    # Every dequantised value lies between the ends of its group's lattice.
    ends = torch.cat([((code - zero) * scale).flatten() for code in (0, q.spec.max_code)])
    if not bool(torch.isfinite(ends).all()) and not bool(
        torch.isfinite(dequantize(q.W_q, scale, zero, q.spec, compute_dtype)).all()
    ):
        limit = torch.finfo(compute_dtype).max
        raise WeightError(
            f"got a weight that reaches {float(W.abs().max()):.3g}; it or its scale and zero go beyond "
            f"{compute_dtype}'s largest, {limit:.3g}. Use compute_dtype=torch.bfloat16 or torch.float32"
        )
    if compute_dtype == torch.float16 and bool((scale < _COARSE_FLOAT16).any()):
        warnings.warn(
            "got groups of weights so small that float16 rounds their values to multiples of 6e-8; "
            "use compute_dtype=torch.bfloat16 or torch.float32 if they matter",
            QuantizationWarning,
            stacklevel=4,
        )


def _cast(stat: Tensor | QTensor, compute_dtype: torch.dtype) -> Tensor:
    return (stat.dequantize(compute_dtype) if isinstance(stat, QTensor) else stat).to(compute_dtype)
