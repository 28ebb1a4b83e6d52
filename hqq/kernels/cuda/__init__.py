"""CUDA C++ kernels, compiled when first needed. Importing this loads neither CUDA nor a compiler."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "Kernel": "hqq.kernels.cuda.kernel",
    "compiler_missing_reason": "hqq.kernels.cuda.nvrtc",
    "prepare_all": "hqq.kernels.cuda.kernel",
    "unavailable_reason": "hqq.kernels.cuda.module",
}

__all__ = sorted(_EXPORTS)  # noqa: PLE0605

if TYPE_CHECKING:
    from hqq.kernels.cuda.kernel import Kernel as Kernel
    from hqq.kernels.cuda.kernel import prepare_all as prepare_all
    from hqq.kernels.cuda.module import unavailable_reason as unavailable_reason
    from hqq.kernels.cuda.nvrtc import compiler_missing_reason as compiler_missing_reason


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hqq.kernels.cuda' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
