"""The low-rank adapter (LoRA)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hqq.core.adapter import LinearAdapter, PeftConfig, at_least_float32, features_of
from hqq.errors import ConfigError, ShapeError


class HQQLinearLoRA(LinearAdapter):
    """`y = x @ W^T + (dropout(x) @ A @ B) * alpha / r + bias`, A [K, r] and B [r, N] trained (Hu et al. 2021).

    Settings: `r` and `lora_alpha`, `dropout` (default 0) of the adapter's input, `lora_init` (tensors `lora_A` and
    `lora_B` to start from; otherwise A is uniform in ±1/sqrt(r), as the original starts it, and B zero), and those of
    `LinearAdapter`. The adapter computes in `train_dtype`; the output has the frozen layer's dtype.
    """

    required = ("r", "lora_alpha")

    def __init__(self, linear_layer: nn.Module, peft_config: PeftConfig) -> None:
        super().__init__(linear_layer, peft_config)
        self.r: int = self.peft_config["r"]
        self.lora_alpha: float = self.peft_config["lora_alpha"]
        self.scaling = self.lora_alpha / self.r
        dropout = float(self.peft_config.get("dropout", 0.0))
        self.peft_drop = (nn.Dropout(dropout) if dropout > 0 else nn.Identity()).train(self.training)
        options: dict[str, Any] = {"device": self.device, "dtype": self.train_dtype}
        self.lora_A = nn.Parameter(torch.empty(self.in_features, self.r, **options))
        self.lora_B = nn.Parameter(torch.zeros(self.r, self.out_features, **options))
        init = self.peft_config.get("lora_init")
        if init is None:
            nn.init.uniform_(self.lora_A, -1 / math.sqrt(self.r), 1 / math.sqrt(self.r))
        else:
            self.load_adapter_state(init)

    @classmethod
    def check(cls, linear_layer: nn.Module, peft_config: PeftConfig) -> None:
        super().check(linear_layer, peft_config)
        r, dropout, init = peft_config["r"], peft_config.get("dropout", 0.0), peft_config.get("lora_init")
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ConfigError(f"got r={r!r}; expected a positive integer, the rank of the adapter")
        if not 0 <= dropout < 1:
            raise ConfigError(f"got dropout={dropout!r}; expected a probability of at least 0 and below 1")
        K, N = features_of(linear_layer)
        for name, shape in (("lora_A", (K, r)), ("lora_B", (r, N))):
            if init is not None and tuple(init[name].shape) != shape:
                raise ShapeError(
                    f"got lora_init[{name!r}] of shape {tuple(init[name].shape)}; expected {shape}"
                )

    def forward_lora(self, x: Tensor) -> Tensor:
        """Return the adapter's share of the output, in the adapter's dtype."""
        dropped: Tensor = self.peft_drop(x.to(self.lora_A.dtype))
        added: Tensor = (dropped @ self.lora_A @ self.lora_B) * self.scaling
        return added

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted layer's output [..., N] for x [..., K]."""
        out: Tensor = self.linear_layer(x)
        added = self.forward_lora(x)
        if self.bias is not None:
            added = added + self.bias
        return out + added.to(out.dtype)

    def effective_weight(self) -> Tensor:
        delta: Tensor = (self.lora_A @ self.lora_B).t() * self.scaling
        return at_least_float32(self.base_weight()) + delta

    def adapter_state(self) -> dict[str, Any]:
        return {**super().adapter_state(), "scaling": self.scaling}

    def load_adapter_state(self, state: Mapping[str, Any]) -> None:
        scaling = state.get("scaling", self.scaling)
        if isinstance(scaling, Tensor) and scaling.numel() != 1:
            raise ShapeError(f"got scaling of shape {tuple(scaling.shape)}; expected one number")
        super().load_adapter_state(state)
        self.scaling = float(scaling)
