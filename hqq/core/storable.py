"""What a compute dtype can and cannot hold of a quantised weight."""

from __future__ import annotations

import math
import warnings
from functools import partial

import torch
from torch import Tensor

from hqq.core.qtensor import QTensor, dequantize
from hqq.core.verdicts import expect
from hqq.errors import QuantizationWarning, WeightError

# Below this, float16 keeps less than three bits of a scale (its numbers are 2^-24 apart there).
_COARSE_FLOAT16 = 2.0**-21


def check_representable(q: QTensor, compute_dtype: torch.dtype) -> None:
    """Raise WeightError if `q` stands for values beyond `compute_dtype`'s largest.

    Warns with QuantizationWarning where float16 is too coarse for the scales of very small weights. Inside `collected`
    both wait until the verdicts are asked for.
    """
    # Nothing dequantised is larger than the left side; a factor leaves room for rounding to the dtype. Nearly always
    # that settles it.
    scale, zero = (_cast(stat, torch.float32) for stat in (q.scale, q.zero))
    good = _largest(scale) * (_largest(zero) + q.spec.max_code) <= torch.finfo(compute_dtype).max / 4
    if compute_dtype == torch.float16:
        good = good & (scale.amin() >= 2 * _COARSE_FLOAT16)
    expect(good, partial(_look_closer, q, compute_dtype))


def _largest(stat: Tensor) -> Tensor:
    largest: Tensor = torch.linalg.vector_norm(stat, math.inf)
    return largest


def _look_closer(q: QTensor, compute_dtype: torch.dtype) -> None:
    scale, zero = (_cast(stat, compute_dtype) for stat in (q.scale, q.zero))
    # Every dequantised value lies between the ends of its group's lattice.
    ends = torch.cat([((code - zero) * scale).flatten() for code in (0, q.spec.max_code)])
    if not bool(torch.isfinite(ends).all()) and not bool(
        torch.isfinite(dequantize(q.W_q, scale, zero, q.spec, compute_dtype)).all()
    ):
        reach = float(_largest(q.dequantize(torch.float64)))
        limit = torch.finfo(compute_dtype).max
        raise WeightError(
            f"got a weight that reaches {reach:.3g}; it or its scale and zero go beyond "
            f"{compute_dtype}'s largest, {limit:.3g}. Use compute_dtype=torch.bfloat16 or torch.float32"
        )
    if compute_dtype == torch.float16 and bool((scale < _COARSE_FLOAT16).any()):
        warnings.warn(
            "got groups of weights so small that float16 rounds their values to multiples of 6e-8; "
            "use compute_dtype=torch.bfloat16 or torch.float32 if they matter",
            QuantizationWarning,
            stacklevel=6,
        )


def _cast(stat: Tensor | QTensor, compute_dtype: torch.dtype) -> Tensor:
    return (stat.dequantize(compute_dtype) if isinstance(stat, QTensor) else stat).to(compute_dtype)
