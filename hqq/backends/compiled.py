"""Dequantisation through torch.compile: one fused loop instead of one pass per operation."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from hqq.core.qtensor import QSpec, QTensor, dequantize


@cache
def _missing(device_type: str) -> str | None:
    """Return what torch.compile lacks for a kind of device, as a sentence, or None."""
    if device_type == "cuda":
        return None if find_spec("triton") else "torch.compile needs triton for GPUs, which is not installed"
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", usual)
    if shutil.which(compiler.split()[0]):
        return None
    return (
        f"torch.compile needs a C++ compiler for the CPU, and there is no {compiler}; install it, or set CXX"
    )


@cache
def _compiled() -> Callable[..., Tensor]:
    # Compiled at the first use, not at import: importing inductor takes seconds.
    return torch.compile(dequantize, dynamic=False, fullgraph=True)


class CompiledBackend:
    """The torch reference, compiled for each shape and setting it meets."""

    name = "pytorch_compile"

    def available(self) -> str | None:
        return None if torch.cuda.is_available() else _missing("cpu")

    def supports(self, spec: QSpec, compute_dtype: torch.dtype, device: torch.device) -> str | None:
        return _missing(device.type)

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
