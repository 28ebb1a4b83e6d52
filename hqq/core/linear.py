"""HQQLinear: a linear layer whose weight is stored as codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hqq.core.config import LegacyConfig, complete_config
from hqq.core.devices import DeviceLike, resolve_device
from hqq.core.matmul import DequantLinear
from hqq.core.meta import qtensor_from_meta
from hqq.core.prepared import PreparedWeight
from hqq.core.quantized_module import QuantizedModule
from hqq.core.quantizer import Quantizer
from hqq.core.storable import check_representable
from hqq.core.watch import before_layer
from hqq.errors import ConfigError, DtypeError, ShapeError


class HQQLinear(QuantizedModule):
    """`y = x @ W^T + bias` with W [N, K] quantised.

    Args:
        linear_layer: the nn.Linear (or any module with weight [N, K] and bias) to quantise; None for an empty layer
            that is filled by `load_state_dict` or `quantize`.
        quant_config: nested configuration, as `BaseQuantizeConfig` gives it; None only for an empty layer.
        del_orig: drop the original's parameters once they are quantised; False leaves `linear_layer` untouched.
        compute_dtype: dtype of scale, zero, bias, input and output.
        device: where the layer lives; None means CUDA where it is present, else the weight's own device.
        initialize: False delays quantisation to a call of `initialize()`.

    Raises ConfigError, DtypeError, ShapeError or WeightError for what cannot be quantised; the original layer is then
    as it was.
    """

    def __init__(
        self,
        linear_layer: nn.Module | None,
        quant_config: Mapping[str, Any] | None,
        del_orig: bool = True,
        compute_dtype: torch.dtype = torch.float16,
        device: DeviceLike = None,
        initialize: bool = True,
    ) -> None:
        before_layer()
        super().__init__(compute_dtype, device)
        if quant_config is not None:
            config: LegacyConfig = complete_config(quant_config)
            self.offload_meta = config.pop("offload_meta")
            self.quant_config = config
        self.del_orig = del_orig
        self.axis: int | None = None
        self.channel_wise: bool | None = None
        self.in_features: int | None = getattr(linear_layer, "in_features", None)
        self.out_features: int | None = getattr(linear_layer, "out_features", None)
        self.linear_layer: nn.Module | None = linear_layer
        if initialize:
            self.initialize()

    def initialize(self) -> None:
        """Quantise `linear_layer`, if there is one that has not been quantised yet."""
        layer = self.linear_layer
        if layer is None or self.is_initialized():
            return
        if self.quant_config is None:
            raise ConfigError("got quant_config=None with a layer to quantise; pass BaseQuantizeConfig(...)")
        weight, bias = layer.weight, getattr(layer, "bias", None)
        assert isinstance(weight, Tensor)
        if self._device is None and not torch.cuda.is_available():
            self._device = weight.device
        self.quantize(weight.data, **self.quant_config)
        if isinstance(bias, Tensor):
            bias = bias.detach().clone().to(self.device, self.compute_dtype)
            self.bias = nn.Parameter(bias, requires_grad=False)
        if self.del_orig:
            for name, _ in list(layer.named_parameters(recurse=False)):
                setattr(layer, name, None)
        # Out of the module tree, or the state dict would hold the weight twice.
        del self._modules["linear_layer"]
        object.__setattr__(self, "linear_layer", None if self.del_orig else layer)

    @classmethod
    def from_weights(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        quant_config: Mapping[str, Any],
        compute_dtype: torch.dtype = torch.float16,
        device: DeviceLike = None,
        del_orig: bool = True,
    ) -> HQQLinear:
        """Return a layer for `weight` [N, K] and `bias` [N]."""
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.out_features, linear.in_features = weight.shape
        linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return cls(linear, quant_config, del_orig=del_orig, compute_dtype=compute_dtype, device=device)

    def quantize(
        self,
        W: Tensor,
        weight_quant_params: Mapping[str, Any],
        scale_quant_params: Mapping[str, Any] | None = None,
        zero_quant_params: Mapping[str, Any] | None = None,
    ) -> None:
        """Quantise `W` [N, K] of any float dtype into this layer; the arguments are the sections of quant_config.

        Raises what `Quantizer.quantize` raises; the layer is unchanged then.
        """
        if W.ndim != 2:
            raise ShapeError(f"got a weight of shape {tuple(W.shape)}; expected two dimensions [out, in]")
        params = dict(weight_quant_params)
        axis = params.get("axis", 0)
        if params.get("group_size", 64) is None and params.get("channel_wise", True):
            params["group_size"] = W.shape[1] if axis == 1 else W.shape[0]
        target = resolve_device(self._device, W.device if not torch.cuda.is_available() else None)
        W_q, meta = Quantizer.quantize(W.detach(), compute_dtype=self.compute_dtype, device=target, **params)
        for name, section in (("scale", scale_quant_params), ("zero", zero_quant_params)):
            if section is not None:
                _quantize_stat(meta, name, section)
        q = qtensor_from_meta(W_q, meta)
        check_representable(q, self.compute_dtype)
        self._device = target
        self._set_qtensor(q)
        self.quant_config = {
            "weight_quant_params": params,
            "scale_quant_params": dict(scale_quant_params) if scale_quant_params else None,
            "zero_quant_params": dict(zero_quant_params) if zero_quant_params else None,
        }
        if self.offload_meta is None:
            self.offload_meta = False
        self._features_from_shape()

    @property
    def _declared_shape(self) -> tuple[int, int] | None:
        if self.in_features is None or self.out_features is None:
            return None
        return (self.out_features, self.in_features)

    def _features_from_shape(self) -> None:
        assert self._spec is not None
        self.out_features, self.in_features = self._spec.shape
        self.axis = self._spec.axis
        self.channel_wise = self._spec.channel_wise

    def dequantize_aten(self) -> Tensor:
        """Same as `dequantize`, under the name of the original's CUDA extension."""
        return self.dequantize()

    def matmul(self, x: Tensor, transpose: bool = True) -> Tensor:
        """Return `x @ W^T` (or `x @ W` with transpose=False)."""
        W = self.dequantize()
        return torch.matmul(x, W.t() if transpose else W)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ W^T + bias`: x [..., K] in the compute dtype, result [..., N]."""
        prepared = self.prepared
        q = self.qtensor() if prepared is None else None
        if x.dtype != self._compute_dtype and not torch.is_autocast_enabled(x.device.type):
            raise DtypeError(
                f"got input of {x.dtype}; the layer computes in {self._compute_dtype}. Cast the input, or the layer "
                f"with .to({x.dtype})"
            )
        if prepared is not None:
            return self._multiply(prepared, x)
        assert q is not None
        backend = self.selection().backend
        if torch.is_grad_enabled() and (
            x.requires_grad or (self.bias is not None and self.bias.requires_grad)
        ):
            scale, zero = self._scale_and_zero()
            args = (x, self.bias, q.W_q, scale, zero, q.spec, backend, self._compute_dtype)
            return DequantLinear.apply(*args)  # type: ignore[no-any-return, no-untyped-call]
        return F.linear(x, backend.dequantize(q.W_q, q.scale, q.zero, q.spec, self._compute_dtype), self.bias)

    def _multiply(self, prepared: PreparedWeight, x: Tensor) -> Tensor:
        K = prepared.spec.shape[1]
        if x.ndim == 0 or x.shape[-1] != K:
            raise ShapeError(f"got input of shape {tuple(x.shape)}; the layer takes [..., {K}]")
        if not torch.is_autocast_enabled(x.device.type):
            return prepared.matmul(x, self.bias)
        # As F.linear does, but computed in the layer's own dtype.
        y = prepared.matmul(x.to(prepared.dtype), self.bias)
        return y.to(torch.get_autocast_dtype(x.device.type))

    def extra_repr(self) -> str:
        if self._spec is None:
            return "not quantised"
        s = self._spec
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"nbits={s.nbits}, group_size={s.group_size}, axis={s.axis}"
        )


def _quantize_stat(meta: dict[str, Any], name: str, section: Mapping[str, Any]) -> None:
    """Replace scale or zero (`name`) in `meta` by its codes and their meta."""
    stat = meta.pop(name)
    params = dict(section)
    group_size = params.get("group_size")
    if group_size is not None and stat.numel() % group_size:
        # The original refuses; the largest divisor keeps the format, and one group for all is always possible.
        divisors = [g for g in range(min(group_size, stat.numel()), 15, -1) if stat.numel() % g == 0]
        params["group_size"] = divisors[0] if divisors else None
        params["channel_wise"] = bool(divisors)
    meta[f"{name}_q"], meta[f"meta_{name}"] = Quantizer.quantize(stat, **params)
