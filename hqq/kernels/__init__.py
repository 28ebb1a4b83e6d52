"""GPU kernels as stand-alone functions. Importing this loads no triton; calling a kernel does."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "dequantize": "hqq.kernels.dequant",
    "dequantize_qtensor": "hqq.kernels.dequant",
    "solve_and_pack": "hqq.kernels.solve",
    "TiledWeight": "hqq.kernels.tiled_weight",
    "tiled_dequantize": "hqq.kernels.tiled_op",
    "tiled_linear": "hqq.kernels.tiled_op",
    "tiled_support": "hqq.kernels.tiled_weight",
    "unavailable_reason": "hqq.kernels.availability",
}

__all__ = sorted(_EXPORTS)  # noqa: PLE0605

if TYPE_CHECKING:
    from hqq.kernels.availability import unavailable_reason as unavailable_reason
    from hqq.kernels.dequant import dequantize as dequantize
    from hqq.kernels.dequant import dequantize_qtensor as dequantize_qtensor
    from hqq.kernels.solve import solve_and_pack as solve_and_pack
    from hqq.kernels.tiled_op import tiled_dequantize as tiled_dequantize
    from hqq.kernels.tiled_op import tiled_linear as tiled_linear
    from hqq.kernels.tiled_weight import TiledWeight as TiledWeight
    from hqq.kernels.tiled_weight import tiled_support as tiled_support


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hqq.kernels' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
