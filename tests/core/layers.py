"""Layers for the tests of the core: a linear with fresh weights, its configuration, its quantised form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hqq.core.config import BaseQuantizeConfig
from hqq.core.linear import HQQLinear


def config(nbits: float = 4, group_size: int | None = 32, axis: int = 1, **options: Any) -> dict[str, Any]:
    """Return a nested configuration for solver "hqq"."""
    return BaseQuantizeConfig(nbits=nbits, group_size=group_size, axis=axis, solver="hqq", **options)


def linear(rng: torch.Generator, out: int = 24, in_: int = 64, bias: bool = True) -> nn.Linear:
    """Return an nn.Linear with fresh weights in float32."""
    layer = nn.Linear(in_, out, bias=bias)
    layer.weight.data = torch.randn(out, in_, generator=rng) * 0.1
    if bias:
        layer.bias.data = torch.randn(out, generator=rng)
    return layer


def quantized(
    rng: torch.Generator, dtype: torch.dtype = torch.float32, bias: bool = True, **options: Any
) -> HQQLinear:
    """Return a quantised layer 24 x 64 on the CPU; `options` go into its configuration."""
    return HQQLinear(linear(rng, bias=bias), config(**options), compute_dtype=dtype, device="cpu")


def exact(layer: HQQLinear, x: Tensor) -> Tensor:
    """The product in float64, from the dequantised weight."""
    bias = None if layer.bias is None else layer.bias.detach().double()
    return F.linear(x.detach().double(), layer.dequantize().double(), bias)


def product_bound(layer: HQQLinear, x: Tensor) -> Tensor:
    """How far the layer's output in its compute dtype may be from `exact`."""
    return linear_bound(x.to(layer.compute_dtype), layer.dequantize(), layer.bias)


def linear_bound(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """How far `x @ W.t() + bias` in the dtype of `x` may be from the same in exact arithmetic.

    K + 1 additions of rounded products: |error| <= (K + 2) u sum |x W| + u |bias|, and the result's own rounding.
    """
    u = torch.finfo(x.dtype).eps / 2
    accumulate = min(u, 2.0**-24)  # sums of 16-bit products are kept in float32 (or finer)
    magnitude = x.detach().double().abs() @ W.detach().double().abs().t()
    if bias is not None:
        magnitude = magnitude + bias.detach().double().abs()
    # bias and sum may be rounded to the dtype one after the other
    return magnitude * ((x.shape[-1] + 2) * accumulate + 2 * u) + torch.finfo(x.dtype).tiny


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two layer states have the same keys, types, dtypes, shapes and bits."""
    return a.keys() == b.keys() and all(same_value(a[key], b[key]) for key in a)


def same_value(a: Any, b: Any) -> bool:
    """Whether two values of a layer state are the same, to the bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(_bits(a), _bits(b)))
    if isinstance(a, dict) and isinstance(b, dict):
        return same_state(a, b)
    return type(a) is type(b) and bool(a == b)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
