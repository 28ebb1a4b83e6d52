"""Adapters that change the weight itself before it is multiplied, and so rebuild it in the backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hqq.core.adapter import LinearAdapter, PeftConfig, at_least_float32
from hqq.core.config import is_config_dict
from hqq.core.linear import HQQLinear
from hqq.core.lora import HQQLinearLoRA
from hqq.core.qtensor import dequantize
from hqq.core.quantizer import Quantizer
from hqq.errors import ConfigError


class _StraightThrough(torch.autograd.Function):
    """Quantise and dequantise a weight; the gradient passes as if nothing had happened (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, params: Mapping[str, Any]) -> Tensor:
        W_q, meta = Quantizer.quantize(W, **params)
        return Quantizer.dequantize(W_q, {**meta, "compute_dtype": W.dtype})

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


class _RecomputedProduct(LinearAdapter):
    """`y = x @ W^T + bias` with W = `effective_weight()`, which no graph keeps: the backward pass builds it again."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted layer's output [..., N] for x [..., K], in x's dtype."""
        if not torch.is_grad_enabled():
            return self._product(x)
        random = any(isinstance(m, nn.Dropout) and m.training for m in self.children())
        out: Tensor = checkpoint(self._product, x, use_reentrant=False, preserve_rng_state=random)
        return out

    def _product(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.effective_weight().to(x.dtype), bias)


class HQQLinearLoRAWithFakeQuant(_RecomputedProduct, HQQLinearLoRA):
    """Low-rank adapter trained for what is left of it after quantisation: `W' = Q(W + (A @ B)^T * alpha / r)`.

    Settings are those of HQQLinearLoRA and `quant_param`: keyword arguments of `Quantizer.quantize`, or a nested
    quantisation config of which the weight's section counts; None for no quantisation. Gradients pass Q unchanged.
    As there is one weight for all inputs, dropout drops the same features of the adapter's input for all of them.
    """

    def __init__(self, linear_layer: nn.Module, peft_config: PeftConfig) -> None:
        super().__init__(linear_layer, peft_config)
        params: Mapping[str, Any] = self.peft_config.get("quant_param") or {}
        self.quant_param = dict(params["weight_quant_params"] if is_config_dict(params) else params)

    def fake_quant(self, W: Tensor) -> Tensor:
        """Return `W` quantised and dequantised, the gradient passed straight through."""
        if not self.quant_param:
            return W
        params = {**self.quant_param, "bitpack": False, "view_as_float": False}
        quantised: Tensor = _StraightThrough.apply(W, params)  # type: ignore[no-untyped-call]
        return quantised

    def effective_weight(self) -> Tensor:
        kept = self.peft_drop(self.lora_A.new_ones(self.in_features, 1))
        delta = ((self.lora_A * kept) @ self.lora_B).t() * self.scaling
        return self.fake_quant(at_least_float32(self.base_weight()) + delta)


class HQQLinearGroupedProj(_RecomputedProduct):
    """Rows of the weight mixed block by block: `W' = blockdiag(P_1 .. P_n) @ W`, every P trained from the identity.

    Settings: `proj_num` blocks P of `proj_size` x `proj_size` over `W.reshape(proj_num, proj_size, -1)`, and
    `zero_trainable` (also train the zeros of a quantised layer; default False), and those of `LinearAdapter`.
    """

    required = ("proj_size", "proj_num")

    def __init__(self, linear_layer: nn.Module, peft_config: PeftConfig) -> None:
        super().__init__(linear_layer, peft_config)
        self.proj_size: int = self.peft_config["proj_size"]
        self.proj_num: int = self.peft_config["proj_num"]
        eye = torch.eye(self.proj_size, dtype=self.train_dtype, device=self.device)
        self.proj = nn.Parameter(eye.repeat(self.proj_num, 1, 1))
        self.zero: nn.Parameter | None = None
        if self.peft_config.get("zero_trainable", False):
            assert isinstance(linear_layer, HQQLinear)
            zero = linear_layer._scale_and_zero()[1]
            self.zero = nn.Parameter(zero.detach().clone().to(self.train_dtype))

    @classmethod
    def check(cls, linear_layer: nn.Module, peft_config: PeftConfig) -> None:
        super().check(linear_layer, peft_config)
        size, num = peft_config["proj_size"], peft_config["proj_num"]
        N, K = int(linear_layer.out_features), int(linear_layer.in_features)  # type: ignore[arg-type]
        if min(size, num) < 1 or (N * K) % (size * num):
            raise ConfigError(
                f"got proj_size={size} and proj_num={num} for a weight of {N} x {K}; use a proj_size that divides "
                f"{N} and proj_num = {N} / proj_size"
            )
        if peft_config.get("zero_trainable", False) and not isinstance(linear_layer, HQQLinear):
            raise ConfigError(
                f"got zero_trainable=True for {type(linear_layer).__name__}, which has no zeros; use False, or "
                "quantise the layer first"
            )

    def effective_weight(self) -> Tensor:
        layer = self.linear_layer
        if self.zero is not None:
            assert isinstance(layer, HQQLinear)
            q, scale = layer.qtensor(), layer._scale_and_zero()[0].to(self.zero.dtype)
            W = dequantize(q.W_q, scale, self.zero, q.spec, self.zero.dtype)
        else:
            W = self.base_weight().to(self.proj.dtype)
        return (self.proj @ W.reshape(self.proj_num, self.proj_size, -1)).reshape(W.shape)

    def adapter_state(self) -> dict[str, Any]:
        return {**super().adapter_state(), "peft_config": self.peft_config}
