"""Which code dequantises a layer's weight: the protocol, the registry, and a choice that gives its reasons."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from hqq.core.qtensor import QSpec, QTensor
from hqq.errors import BackendError

_logger = logging.getLogger(__name__)


class HQQBackend(Enum):
    """The native backends. The ATEN names of the original stand for the Triton kernels."""

    PYTORCH = "pytorch"
    PYTORCH_COMPILE = "pytorch_compile"
    TRITON = "triton"

    ATEN = "triton"
    PYTORCH_BACKPROP = "pytorch"
    PYTORCH_BACKPROP_COMPILE = "pytorch_compile"
    ATEN_BACKPROP = "triton"
    PYTORCH_FORWARD = "pytorch"
    PYTORCH_FORWARD_COMPILE = "pytorch_compile"
    ATEN_FORWARD = "triton"
    ATEN_FORWARD_INT8 = "triton"


class DequantBackend(Protocol):
    """Dequantises packed codes. Instances have no state and are shared by all layers."""

    name: str

    def available(self) -> str | None:
        """Return None if the backend runs on this machine, else a sentence that says why not."""
        ...

    def supports(self, spec: QSpec, compute_dtype: torch.dtype, device: torch.device) -> str | None:
        """Return None if the backend takes tensors of this description, else a sentence that says why not."""
        ...

    def dequantize(
        self,
        W_q: Tensor,
        scale: Tensor | QTensor,
        zero: Tensor | QTensor,
        spec: QSpec,
        compute_dtype: torch.dtype,
    ) -> Tensor:
        """Return `(W_q - zero) * scale` of spec.shape in compute_dtype; scale and zero may be quantised themselves."""
        ...


class EagerBackend:
    """The torch reference: any device, any setting."""

    name = "pytorch"

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
        return QTensor(W_q, scale, zero, spec).dequantize(compute_dtype)


@dataclass(frozen=True)
class Selection:
    """The backend a layer got, and, if it is not the one asked for, why."""

    backend: DequantBackend
    asked: str
    reason: str | None = None


EAGER = EagerBackend()

# Modules that hold a backend as `BACKEND`, imported when first asked for: they may need libraries that are absent.
_MODULES: dict[str, str] = {
    "pytorch_compile": "hqq.backends.compiled",
    "triton": "hqq.backends.triton",
}


def get_backend(name: str) -> DequantBackend:
    """Return the backend called `name`; raises BackendError if there is none of that name."""
    if name == EAGER.name:
        return EAGER
    if name not in _MODULES:
        raise BackendError(f"got backend {name!r}; expected one of {', '.join((EAGER.name, *_MODULES))}")
    backend: DequantBackend = import_module(_MODULES[name]).BACKEND
    return backend


def select(name: str, spec: QSpec, compute_dtype: torch.dtype, device: torch.device) -> Selection:
    """Return the backend called `name` if it runs here and takes `spec`, else the reference and the reason."""
    backend = get_backend(name)
    reason = backend.available() or backend.supports(spec, compute_dtype, device)
    if reason is None:
        return Selection(backend, name)
    if not torch.compiler.is_compiling():  # a log call would break the graph
        _tell(name, reason)
    return Selection(EAGER, name, reason)


@cache
def _tell(name: str, reason: str) -> None:
    # Once for each reason, not once for each layer.
    _logger.warning("backend %r is not used, layers dequantise with %r: %s", name, EAGER.name, reason)
