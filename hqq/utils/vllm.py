"""The original's path to vLLM. This version does not support vLLM, and every name here says so when it is called."""

from __future__ import annotations

from enum import Enum
from typing import Any, NoReturn

from hqq.errors import BackendError

__all__ = ["VLLM_HQQ_BACKEND", "set_vllm_hqq_backend", "set_vllm_onthefly_hqq_quant"]


class VLLM_HQQ_BACKEND(Enum):  # noqa: N801 - the name that scripts import
    """The backends that scripts name before they call anything."""

    MARLIN = "marlin"
    GEMLITE = "gemlite"
    PYTORCH = "pytorch"


def set_vllm_hqq_backend(backend: object = None) -> NoReturn:
    """Raise BackendError: vLLM is not supported."""
    _refuse("set_vllm_hqq_backend")


def set_vllm_onthefly_hqq_quant(*args: Any, **kwargs: Any) -> NoReturn:
    """Raise BackendError: vLLM is not supported."""
    _refuse("set_vllm_onthefly_hqq_quant")


def _refuse(name: str) -> NoReturn:
    raise BackendError(
        f"got a call of {name}; this version of hqq does not support vLLM (which removed HQQ in 0.15). "
        "Serve the model with transformers instead: from_pretrained(..., quantization_config=HqqConfig(...))"
    )
