"""What every adapter is: a small trainable module around a frozen linear layer, quantised or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hqq.core.config import QuantConfig
from hqq.core.linear import HQQLinear
from hqq.errors import ConfigError, MissingKeysError, ShapeError

PeftConfig = Mapping[str, Any]

SETTINGS = (
    *("lora_type", "train_dtype", "train_bias", "r", "lora_alpha", "dropout", "lora_init"),
    *("quant_param", "proj_size", "proj_num", "zero_trainable"),
)
"""Names of the settings of all adapters."""


class LinearAdapter(nn.Module):
    """What all adapters share: the frozen layer, its bias, casting, merging and the adapter's own state.

    The adapter takes the layer's bias over, as `bias`. Everything follows the nn.Module protocol: `state_dict` holds
    the frozen layer too, `adapter_state` only what the adapter adds.

    Args:
        linear_layer: an nn.Linear, an HQQLinear, or a module with in_features, out_features, bias and either
            `dequantize()` or `weight` [N, K].
        peft_config: settings by name. Common ones are `train_dtype` (dtype of what is trained; default float32) and
            `train_bias` (train the bias, from zero where there is none; default False).

    Raises ConfigError for settings that are missing, unknown, or do not fit the layer.
    """

    required: tuple[str, ...] = ()

    def __init__(self, linear_layer: nn.Module, peft_config: PeftConfig) -> None:
        super().__init__()
        self.check(linear_layer, peft_config)
        self.peft_config = dict(peft_config)
        self.linear_layer = linear_layer.requires_grad_(False)
        self.in_features, self.out_features = features_of(linear_layer)
        self.train_dtype: torch.dtype = self.peft_config.get("train_dtype", torch.float32)
        self.train_bias = bool(self.peft_config.get("train_bias", False))
        # A trained addend must not be hidden in a layer that computes in a lower precision.
        bias = getattr(linear_layer, "bias", None)
        linear_layer.bias = None  # type: ignore[assignment]
        if bias is None and self.train_bias:
            bias = torch.zeros(self.out_features, device=self.device)
        self.bias: nn.Parameter | None = None
        if bias is not None:
            bias = bias.detach().clone().to(self.train_dtype if self.train_bias else bias.dtype)
            self.bias = nn.Parameter(bias, requires_grad=self.train_bias)
        self.train(linear_layer.training)

    @classmethod
    def check(cls, linear_layer: nn.Module, peft_config: PeftConfig) -> None:
        """Raise ConfigError (or ShapeError) if the settings cannot be used for this layer, which stays as it is."""
        features_of(linear_layer)
        missing = [key for key in cls.required if key not in peft_config]
        # Settings of the other adapters may stay when the type is changed; a name that none has is a mistake.
        unknown = [key for key in peft_config if key not in SETTINGS]
        if missing or unknown:
            raise ConfigError(
                f"got settings for {cls.__name__} with missing {missing} and unknown {unknown}; "
                f"expected {', '.join(cls.required)} and any of {', '.join(SETTINGS)}"
            )

    @property
    def device(self) -> torch.device:
        """Where the layer is."""
        layer = self.linear_layer
        return layer.device if isinstance(layer, HQQLinear) else next(layer.parameters()).device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype that the frozen layer computes in."""
        layer = self.linear_layer
        return layer.compute_dtype if isinstance(layer, HQQLinear) else next(layer.parameters()).dtype

    def base_weight(self) -> Tensor:
        """Return the frozen weight [N, K], dequantised if need be, without gradient."""
        layer = self.linear_layer
        with torch.no_grad():
            W = layer.dequantize() if hasattr(layer, "dequantize") else layer.weight  # type: ignore[operator]
        assert isinstance(W, Tensor)
        return W.detach()

    def effective_weight(self) -> Tensor:
        """Return the weight [N, K] that the adapted layer stands for (without dropout), differentiable."""
        raise NotImplementedError

    @torch.no_grad()
    def merge_and_quantize(self, quant_config: Mapping[str, Any] | QuantConfig | None) -> nn.Module:
        """Return one layer with frozen layer and adapter merged, bias included, in the frozen layer's compute dtype.

        An HQQLinear quantised by `quant_config`, or a dequantised nn.Linear where that is None. Raises what quantising
        raises.
        """
        training, W = self.training, self.eval().effective_weight()
        self.train(training)
        bias = None if self.bias is None else self.bias.detach().to(self.compute_dtype)
        if quant_config is not None:
            config = quant_config.to_dict() if isinstance(quant_config, QuantConfig) else quant_config
            return HQQLinear.from_weights(W, bias, config, self.compute_dtype, self.device).train(training)
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(W.to(self.compute_dtype), requires_grad=False)
        linear.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        return linear.train(training)

    def cast(self, dtype: torch.dtype = torch.float16) -> LinearAdapter:
        """Cast what the adapter adds (and the bias) to `dtype` and return self; the frozen layer stays as it is."""
        for parameter in self.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        return self

    def adapter_state(self) -> dict[str, Any]:
        """Return what the adapter adds, under the keys of the original's adapter files, tensors on the CPU."""
        state: dict[str, Any] = {
            name: p.detach().cpu().clone() for name, p in self.named_parameters(recurse=False)
        }
        return {**state, "bias": state.get("bias")}

    def load_adapter_state(self, state: Mapping[str, Any]) -> None:
        """Load what `adapter_state` returned; values are cast to the dtypes of this adapter.

        Raises MissingKeysError or ShapeError for a state that does not fit; nothing has been changed then.
        """
        own = dict(self.named_parameters(recurse=False))
        # The frozen layer's bias is already there, and older files may lack it.
        missing = [name for name in own if state.get(name) is None and name != "bias"]
        if missing or (self.bias is None and state.get("bias") is not None):
            raise MissingKeysError(
                f"got an adapter state with missing {missing} and bias={state.get('bias') is not None}; "
                f"expected {', '.join(own)} for {type(self).__name__} with bias={self.bias is not None}"
            )
        given = {name: state[name] for name in own if state.get(name) is not None}
        for name, tensor in given.items():
            if tensor.shape != own[name].shape:
                raise ShapeError(
                    f"got {name} of shape {tuple(tensor.shape)}; expected {tuple(own[name].shape)}"
                )
        for name, tensor in given.items():
            own[name].data.copy_(tensor.detach())


def at_least_float32(W: Tensor) -> Tensor:
    """Return `W` in float32, or in float64 if it is so already."""
    return W.to(torch.promote_types(W.dtype, torch.float32))


def features_of(layer: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features) of a layer to adapt; raises ConfigError if it has none."""
    K, N = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    if not isinstance(K, int) or not isinstance(N, int):
        raise ConfigError(
            f"got {type(layer).__name__} to adapt; expected an nn.Linear or a quantised HQQLinear"
        )
    return K, N
