"""Half-Quadratic Quantization: calibration-free weight quantisation of PyTorch models at 8 to 1 bits."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "1.0.0"

# Public name -> module that defines it. Imported on first use: `import hqq` itself stays light.
_EXPORTS = {
    "BaseQuantizeConfig": "hqq.core.config",
    "Calibration": "hqq.models.calibration",
    "HQQBackend": "hqq.core.backend",
    "HQQEmbedding": "hqq.core.embedding",
    "HQQLinear": "hqq.core.linear",
    "QuantConfig": "hqq.core.config",
    "QuantizationReport": "hqq.models.report",
    "Quantizer": "hqq.core.quantizer",
    "load_quantized": "hqq.models.checkpoint",
    "quantize_model": "hqq.models.quantize",
    "save_quantized": "hqq.models.checkpoint",
}

__all__ = ["__version__", *sorted(_EXPORTS)]  # noqa: PLE0604

if TYPE_CHECKING:
    from hqq.core.backend import HQQBackend as HQQBackend
    from hqq.core.config import BaseQuantizeConfig as BaseQuantizeConfig
    from hqq.core.config import QuantConfig as QuantConfig
    from hqq.core.embedding import HQQEmbedding as HQQEmbedding
    from hqq.core.linear import HQQLinear as HQQLinear
    from hqq.core.quantizer import Quantizer as Quantizer
    from hqq.models.calibration import Calibration as Calibration
    from hqq.models.checkpoint import load_quantized as load_quantized
    from hqq.models.checkpoint import save_quantized as save_quantized
    from hqq.models.quantize import quantize_model as quantize_model
    from hqq.models.report import QuantizationReport as QuantizationReport


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hqq' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
