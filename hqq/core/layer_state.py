"""state_dict and load_state_dict of a quantised layer, in the wire format of the original."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Mapping

import torch
from torch import Tensor, nn

from hqq.core.meta import meta_of, qtensor_from_meta
from hqq.core.wire import LAYER_KEYS, NESTED_KEYS, QUANTIZED_STAT_KEYS, decode_state, encode_state
from hqq.errors import HQQError, MissingKeysError, ShapeError

if TYPE_CHECKING:
    from hqq.core.quantized_module import QuantizedModule

_WEIGHT_PARAMS = ("nbits", "channel_wise", "group_size", "optimize", "round_zero", "axis", "view_as_float")
_REQUIRED = ("W_q", "nbits", "shape", "axis")
_KNOWN = {*LAYER_KEYS, *QUANTIZED_STAT_KEYS, *NESTED_KEYS, "bias", "meta", "scale_quant_params", "zero_quant_params"}


def layer_state(layer: QuantizedModule, encoded: bool) -> dict[str, Any]:
    """Return the layer's state: tensors only if `encoded`, else values of raw Python types."""
    q = layer.qtensor()
    state: dict[str, Any] = {"W_q": q.W_q, **meta_of(q, layer.compute_dtype)}
    if layer.bias is not None:
        state["bias"] = layer.bias
    state["offload_meta"] = bool(layer.offload_meta)
    if encoded:
        state["encoded_state_dict"] = True
    state["stores_quant_config"] = True
    params = (layer.quant_config or {}).get("weight_quant_params", {})
    defaults = {"channel_wise": q.spec.channel_wise, "optimize": True, "round_zero": False}
    for key in _WEIGHT_PARAMS:
        if key not in state:
            state[key] = params.get(key, defaults.get(key))
    return encode_state(state) if encoded else state


def missing_keys(state: Mapping[str, Any]) -> list[str]:
    """Return the keys without which `state` (no prefix) does not describe a layer."""
    if "meta" in state:
        return [] if "W_q" in state else ["W_q"]
    missing = [key for key in _REQUIRED if key not in state]
    if "zero_scale" not in state:
        missing += [key for key in ("scale", "zero") if key not in state and f"{key}_q" not in state]
    return missing


def unexpected_keys(state: Mapping[str, Any]) -> list[str]:
    """Return the keys of `state` (no prefix) that no version of the format has."""
    return [key for key in state if key not in _KNOWN and key.partition(".")[0] not in NESTED_KEYS]


def load_layer_state(layer: QuantizedModule, state: Mapping[str, Any]) -> None:
    """Make `layer` hold what `state` (no prefix; encoded or raw, of any version) describes; `state` is not changed.

    Raises ShapeError if the layer has a weight of another shape, and what decoding raises. The layer is only
    changed once everything has been read.
    """
    decoded = decode_state(state)
    meta = dict(decoded["meta"]) if "meta" in decoded else decoded
    if "group_size" not in meta:
        meta["group_size"] = None
    q = qtensor_from_meta(decoded["W_q"], meta)
    expected = layer._spec.shape if layer._spec is not None else layer._declared_shape
    if expected is not None and tuple(q.spec.shape) != tuple(expected):
        raise ShapeError(f"got a quantised weight of shape {tuple(q.spec.shape)}; the layer's is {tuple(expected)}")
    bias = decoded.get("bias")
    if bias is not None and bias.shape != (q.spec.shape[0],):
        raise ShapeError(f"got a bias of shape {tuple(bias.shape)}; expected ({q.spec.shape[0]},)")
    layer.quant_config = _quant_config(decoded, meta)
    layer.offload_meta = bool(decoded.get("offload_meta") or False)
    layer._set_qtensor(q)
    layer.bias = None if bias is None else bias.detach().to(layer.device, layer.compute_dtype)
    layer._features_from_shape()


def _quant_config(decoded: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested configuration that a state was written under, as far as it says."""
    weight = {
        "nbits": meta["nbits"],
        "channel_wise": decoded.get("channel_wise", True),
        "group_size": meta["group_size"],
        "optimize": decoded.get("optimize", True),
        "round_zero": decoded.get("round_zero", meta["nbits"] == 4),
        "axis": meta["axis"],
        "view_as_float": bool(meta.get("view_as_float", False)),
    }
    sections: dict[str, Any] = {"weight_quant_params": weight}
    for name in ("scale", "zero"):
        nested = meta.get(f"meta_{name}")
        params = None
        if nested is not None:
            group_size = nested.get("group_size")
            params = {
                "nbits": nested["nbits"],
                "channel_wise": group_size is not None,
                "group_size": group_size,
                "optimize": False,
            }
        sections[f"{name}_quant_params"] = params
    return sections


class LayerStateMixin(nn.Module):
    """The state-dict methods of a quantised layer."""

    encoded_state_dict: bool

    def state_dict_keys(self) -> set[str]:
        """Return the keys of the wire format."""
        return {*LAYER_KEYS, "bias"}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the layer's state; a layer without a weight gives every key with None."""
        if not self.is_initialized() and not args and kwargs.get("destination") is None:
            return {key: None for key in self.state_dict_keys()}
        return super().state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self.is_initialized():
            return
        for key, value in layer_state(self, self.encoded_state_dict).items():  # type: ignore[arg-type]
            if isinstance(value, Tensor) and not keep_vars:
                value = value.detach()
            destination[prefix + key] = value

    def load_state_dict(  # type: ignore[override]
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load one layer's state, encoded or raw, of any version; `state_dict` is not changed.

        Raises MissingKeysError for missing keys and, if `strict`, for unknown ones; ShapeError, DtypeError or
        CorruptCheckpointError for values that do not fit.
        """
        missing, unexpected = missing_keys(state_dict), unexpected_keys(state_dict)
        if missing or (strict and unexpected):
            raise MissingKeysError(
                f"got a layer state with missing keys {missing} and unknown keys {unexpected}; expected "
                f"{', '.join(LAYER_KEYS)} and optionally bias. Was it written by hqq?"
            )
        load_layer_state(self, state_dict)  # type: ignore[arg-type]
        return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        own = {key: value for key, value in own.items() if not key.startswith("linear_layer.")}
        absent = missing_keys(own)
        unexpected.extend(prefix + key for key in unexpected_keys(own))
        if absent:
            missing.extend(prefix + key for key in absent)
            return
        try:
            load_layer_state(self, own)  # type: ignore[arg-type]
        except (HQQError, AttributeError) as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")

    def is_initialized(self) -> bool:
        raise NotImplementedError
