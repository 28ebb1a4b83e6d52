"""gemlite's kernels for HQQ layers, under the original's path: gemlite takes the layer, and its module replaces it."""

from __future__ import annotations

from typing import Any

from torch import nn

from hqq.core.linear import HQQLinear
from hqq.core.lora import HQQLinearLoRA
from hqq.errors import BackendError


def patch_hqq_to_gemlite(layer: nn.Module, patch_params: Any = None) -> nn.Module:
    """Return gemlite's layer in place of an HQQLinear (or inside an HQQLinearLoRA); others come back as they are.

    patch_params is there for `patch_linearlayers` and is not used. The HQQLinear is empty afterwards. Raises
    BackendError if gemlite is not there or does not take the layer; the layer is as it was then.
    """
    hqq_layer = layer.linear_layer if isinstance(layer, HQQLinearLoRA) else layer
    if not isinstance(hqq_layer, HQQLinear):
        return layer
    processor = _processor()
    _check(hqq_layer)
    new: nn.Module = processor(device=str(hqq_layer.device)).from_hqqlinear(hqq_layer)
    if isinstance(layer, HQQLinearLoRA):
        layer.linear_layer = new
        return layer
    return new


def _processor() -> Any:
    try:
        from gemlite.helper import A16Wn
    except ImportError as error:
        raise BackendError(f"got no gemlite ({error}); pip install gemlite, or use another backend") from None
    except (AssertionError, RuntimeError) as error:  # it asks for the GPU's properties when it is imported
        raise BackendError(
            f"got a gemlite that cannot be imported here ({error}); it needs a GPU, use another backend"
        ) from error
    return A16Wn


def _check(layer: HQQLinear) -> None:
    spec = layer.qtensor().spec
    if spec.axis != 1:
        raise BackendError(f"got a layer with axis={spec.axis}; gemlite takes axis=1 only")
    if spec.nbits not in (8, 4, 2, 1):
        raise BackendError(f"got a layer of {spec.nbits:g} bits; gemlite takes 8, 4, 2 and 1")
    meta = layer.meta
    assert meta is not None
    if meta["quant_scale"] or meta["quant_zero"]:
        raise BackendError("got a layer whose scale or zero is quantised; gemlite takes plain ones")
