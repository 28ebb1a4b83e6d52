"""Dequantisation through torch.compile: one fused loop instead of one pass per operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from hqq.core.qtensor import QSpec, QTensor, dequantize


@cache
def _compiled() -> Callable[..., Tensor]:
    # Compiled at the first use, not at import: importing inductor takes seconds.
    return torch.compile(dequantize, dynamic=False, fullgraph=True)


class CompiledBackend:
    """The torch reference, compiled for each shape and setting it meets."""

    name = "pytorch_compile"

    def available(self) -> str | None:
        return None

    def supports(self, spec: QSpec, compute_dtype: torch.dtype, device: torch.device) -> str | None:
        return None

    def dequantize(
        self,
        W_q: Tensor,
        scale: Tensor | QTensor,
        zero: Tensor | QTensor,
        spec: QSpec,
        compute_dtype: torch.dtype,
    ) -> Tensor:
        scale = scale.dequantize(compute_dtype) if isinstance(scale, QTensor) else scale
        zero = zero.dequantize(compute_dtype) if isinstance(zero, QTensor) else zero
        if torch.compiler.is_compiling():
            return dequantize(W_q, scale, zero, spec, compute_dtype)
        return _compiled()(W_q, scale, zero, spec, compute_dtype)


BACKEND = CompiledBackend()
