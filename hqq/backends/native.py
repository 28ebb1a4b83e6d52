"""The library's own fused kernels: products straight from codes in tile order, for every bit width and both axes."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from hqq.core.prepared import PreparedWeight, plain
from hqq.core.qtensor import QSpec, QTensor
from hqq.errors import BackendError
from hqq.kernels.cuda.module import unavailable_reason
from hqq.kernels.tiled_op import tiled_dequantize, tiled_linear
from hqq.kernels.tiled_weight import TiledWeight, tiled_support


class NativeWeight(PreparedWeight):
    """A weight in tile order; `tiled` is what the kernels take."""

    backend = "native"

    def __init__(self, q: QTensor, dtype: torch.dtype) -> None:
        super().__init__(q, dtype, keep=())
        self._keep(TiledWeight.from_qtensor(plain(q, dtype), dtype))

    def _keep(self, tiled: TiledWeight) -> None:
        self.tiled = tiled
        for name in ("codes", "meta", "rows"):
            self.register_buffer(name, getattr(tiled, name), persistent=False)

    def stored_in(self, tiled: TiledWeight) -> NativeWeight:
        """Return this weight with `tiled`, the same codes and scales elsewhere in memory, as what it holds.

        For layers whose weights were joined: `tiled` is what `TiledWeight.split` returns for this one. Raises
        BackendError for a weight of another shape, bit width or grouping.
        """
        mine, its = ((w.spec, w.dtype, w.device) for w in (self.tiled, tiled))
        if mine != its or len(tiled.parts) != 1:
            raise BackendError(f"got a tiled weight of {its}; expected one of {mine}")
        other = copy.copy(self)
        other._buffers = dict(self._buffers)
        other._keep(tiled)
        return other

    def multiply(self, x: Tensor) -> Tensor:
        return tiled_linear(x, self.tiled)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return tiled_linear(x, self.tiled, bias)

    def dequantize(self) -> Tensor:
        return tiled_dequantize(self.tiled)

    def codes_and_stats(self) -> tuple[Tensor, Tensor | QTensor, Tensor | QTensor]:
        q = self.tiled.to_qtensor()
        scale, zero = (self.nested(name) or stat for name, stat in (("scale", q.scale), ("zero", q.zero)))
        return q.W_q, scale, zero


class NativeBackend:
    """Kernels in CUDA C++, compiled at run time."""

    name = "native"

    def available(self) -> str | None:
        return unavailable_reason()

    def supports(self, spec: QSpec, compute_dtype: torch.dtype, device: torch.device) -> str | None:
        return unavailable_reason(device) or tiled_support(replace(spec, view_as_float=False), compute_dtype)

    def prepare(self, q: QTensor, dtype: torch.dtype) -> NativeWeight:
        return NativeWeight(q, dtype)


MATMUL = NativeBackend()
