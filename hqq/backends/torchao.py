"""torch's int4 kernels through torchao's own HQQ layer, under the original's path."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hqq.core.linear import HQQLinear
from hqq.core.lora import HQQLinearLoRA
from hqq.errors import BackendError

_GROUP_SIZES = (32, 64, 128, 256)
_INNER_K_TILES = 8


def patch_hqq_to_aoint4(layer: nn.Module, patch_params: Any = None) -> nn.Module:
    """Return torchao's int4 layer in place of an HQQLinear (or inside an HQQLinearLoRA); others come back as they are.

    patch_params is there for `patch_linearlayers` and is not used. The HQQLinear is emptied. Raises BackendError if
    torchao is not there or does not take the layer (4 bits, axis=1, bfloat16, group size 32, 64, 128 or 256); the
    layer is as it was then.
    """
    hqq_layer = layer.linear_layer if isinstance(layer, HQQLinearLoRA) else layer
    if not isinstance(hqq_layer, HQQLinear):
        return layer
    layer_class = _layer_class()
    _check(hqq_layer)
    new: nn.Module = layer_class(
        None,
        hqq_layer.quant_config,
        compute_dtype=hqq_layer.compute_dtype,
        device=hqq_layer.device,
        initialize=False,
        inner_k_tiles=_INNER_K_TILES,
    ).initialize_with_hqq_quants(hqq_layer.W_q, hqq_layer.meta, hqq_layer.bias)
    hqq_layer.W_q = hqq_layer.bias = None
    hqq_layer.meta = None
    if isinstance(layer, HQQLinearLoRA):
        layer.linear_layer = new
        return layer
    return new


def _layer_class() -> Any:
    try:
        from torchao.prototype.hqq.hqq_tinygemm_linear import HQQLinearTorchWeightOnlyInt4
    except ImportError as error:
        raise BackendError(
            f"got no torchao with its HQQ layer ({error}); pip install torchao, or use another backend"
        ) from None
    return HQQLinearTorchWeightOnlyInt4


def _check(layer: HQQLinear) -> None:
    spec, meta = layer.qtensor().spec, layer.meta
    assert meta is not None
    wrong = {
        f"{spec.nbits:g} bits": spec.nbits != 4,
        f"axis={spec.axis}": spec.axis != 1,
        f"group_size={spec.group_size}": spec.group_size not in _GROUP_SIZES,
        f"{layer.compute_dtype}": layer.compute_dtype != torch.bfloat16,
        "a quantised scale or zero": meta["quant_scale"] or meta["quant_zero"],
        "view_as_float": spec.view_as_float,
        f"in_features={spec.shape[1]}": spec.shape[1] % (16 * _INNER_K_TILES) != 0,
        f"out_features={spec.shape[0]}": spec.shape[0] % 16 != 0,
    }
    found = [text for text, is_wrong in wrong.items() if is_wrong]
    if found:
        raise BackendError(
            f"got a layer with {', '.join(found)}; torch's int4 kernels take 4 bits, axis=1, bfloat16, group_size 32, "
            f"64, 128 or 256, plain scale and zero, and multiples of {16 * _INNER_K_TILES} inputs and 16 outputs"
        )
