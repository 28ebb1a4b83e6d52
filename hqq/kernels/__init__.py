"""GPU kernels as stand-alone functions. Importing this loads no triton; calling a kernel does."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "dequantize": "hqq.kernels.dequant",
    "dequantize_qtensor": "hqq.kernels.dequant",
    "solve_and_pack": "hqq.kernels.solve",
    "unavailable_reason": "hqq.kernels.availability",
}

__all__ = sorted(_EXPORTS)  # noqa: PLE0605

if TYPE_CHECKING:
    from hqq.kernels.availability import unavailable_reason as unavailable_reason
    from hqq.kernels.dequant import dequantize as dequantize
    from hqq.kernels.dequant import dequantize_qtensor as dequantize_qtensor
    from hqq.kernels.solve import solve_and_pack as solve_and_pack


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hqq.kernels' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
