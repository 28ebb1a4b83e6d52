"""Functions applied to every quantised layer of a model, as older scripts prepare one for inference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hqq.backends.prepare import prepare_for_inference
from hqq.core.adapter import LinearAdapter
from hqq.core.config import BaseQuantizeConfig
from hqq.core.linear import HQQLinear
from hqq.core.modules import named_sites, replace_module
from hqq.core.qtensor import QTensor

Patch = Callable[[nn.Module, Any], nn.Module]


def patch_linearlayers(model: nn.Module, fct: Patch, patch_param: Any = None, verbose: bool = False) -> None:
    """Replace every HQQLinear, or the adapter around one, inside `model` by `fct(layer, patch_param)`.

    A layer that `fct` returns unchanged stays. verbose is taken for old callers.
    """
    sites = named_sites(model)
    inside = {part for adapter in sites if isinstance(adapter, LinearAdapter) for part in adapter.modules()}
    for layer, names in sites.items():
        around = isinstance(layer, LinearAdapter)
        if not names[0] or not (around or (isinstance(layer, HQQLinear) and layer not in inside)):
            continue
        patched = fct(layer, patch_param)
        if patched is not layer:
            replace_module(model, names, patched)


def patch_add_quant_config(layer: nn.Module, patch_param: Mapping[str, Any] | None = None) -> nn.Module:
    """Give an HQQLinear, or the one inside an adapter, the quant_config `patch_param`, or, if it has none, its own."""
    quantized = layer.linear_layer if isinstance(layer, LinearAdapter) else layer
    if not isinstance(quantized, HQQLinear):
        return layer
    if patch_param is not None:
        quantized.quant_config = dict(patch_param)
    elif quantized.quant_config is None:
        q = quantized.qtensor()
        spec = q.spec
        config = BaseQuantizeConfig(
            nbits=spec.nbits,
            group_size=spec.group_size,
            axis=spec.axis,
            view_as_float=spec.view_as_float,
            quant_scale=isinstance(q.scale, QTensor),
            quant_zero=isinstance(q.zero, QTensor),
        )
        config.pop("offload_meta", None)
        quantized.quant_config = config
    return layer


def patch_add_weight_param(layer: nn.Module, patch_param: Mapping[str, Any] | None = None) -> nn.Module:
    """Give a layer without `weight` one of a single zero, of its own device and dtype, or those in `patch_param`.

    It is for code that asks for `weight.device` or `weight.dtype`, and no part of the state dict.
    """
    if hasattr(layer, "weight"):
        return layer
    floats = [p for p in layer.parameters() if p.is_floating_point()]
    given = patch_param or {}
    device = floats[0].device if floats else given.get("device")
    dtype = floats[0].dtype if floats else given.get("dtype")
    layer.register_buffer("weight", torch.zeros(1, device=device, dtype=dtype), persistent=False)
    return layer


def patch_hqq_inference(layer: nn.Module, patch_param: Any = None) -> nn.Module:
    """Choose the best native backend for an HQQLinear, or the one inside an adapter.

    Its forward pass needs no replacement: where no gradient is asked for, it keeps none.
    """
    quantized = layer.linear_layer if isinstance(layer, LinearAdapter) else layer
    if isinstance(quantized, HQQLinear) and quantized.is_initialized():
        prepare_for_inference(quantized)
    return layer


def patch_with_backend(layer: nn.Module, backend: str) -> nn.Module:
    """Prepare an HQQLinear, or the one in an adapter, for `backend` and return `layer`; others come back unchanged.

    Raises BackendError if the backend is not there or does not take the layer, which is as it was then.
    """
    quantized = layer.linear_layer if isinstance(layer, LinearAdapter) else layer
    if isinstance(quantized, HQQLinear):
        prepare_for_inference(quantized, backend=backend, strict=True)
    return layer


def patch_lora_inference(layer: nn.Module, patch_param: Any = None) -> nn.Module:
    """Put an adapter into eval mode: without dropout, its forward pass is two products."""
    return layer.eval() if isinstance(layer, LinearAdapter) else layer


def recommended_inductor_config_setter() -> None:
    """Set inductor's options, for the whole process, to those that suit quantised models.

    Tuning by coordinate descent, int8 products fused with the multiplication by their scale, a cache of graphs on disk,
    kernels with names of their own, and TF32 for products in float32.
    """
    from torch._inductor import config

    config.coordinate_descent_tuning = True
    config.coordinate_descent_check_all_directions = True
    config.force_fuse_int_mm_with_mul = True
    config.fx_graph_cache = True
    config.triton.unique_kernel_names = True
    torch.set_float32_matmul_precision("high")
