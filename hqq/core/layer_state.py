"""state_dict and load_state_dict of a quantised layer, in the wire format of the original."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hqq.core.config import WEIGHT_KEYS
from hqq.core.meta import meta_of, qtensor_from_meta
from hqq.core.qtensor import QTensor
from hqq.core.wire import LAYER_KEYS, NESTED_KEYS, QUANTIZED_STAT_KEYS, decode_state, encode_state
from hqq.errors import CorruptCheckpointError, HQQError, MissingKeysError, ShapeError, WeightError

if TYPE_CHECKING:
    from hqq.core.quantized_module import QuantizedModule

_REQUIRED = ("W_q", "nbits", "shape", "axis")
_KNOWN = {
    *LAYER_KEYS,
    *QUANTIZED_STAT_KEYS,
    *NESTED_KEYS,
    "bias",
    "meta",
    "scale_quant_params",
    "zero_quant_params",
}


def layer_state(layer: QuantizedModule, encoded: bool) -> dict[str, Any]:
    """Return the layer's state: tensors only if `encoded`, else values of raw Python types."""
    q = layer.qtensor()
    state: dict[str, Any] = {"W_q": q.W_q, **meta_of(q, layer.compute_dtype)}
    state["shape"] = torch.Size(layer.stored_shape())
    if layer.bias is not None:
        state["bias"] = layer.bias
    state["offload_meta"] = bool(layer.offload_meta)
    if encoded:
        state["encoded_state_dict"] = True
    state["stores_quant_config"] = True
    params = (layer.quant_config or {}).get("weight_quant_params", {})
    defaults = {"channel_wise": q.spec.channel_wise, "optimize": True, "round_zero": False}
    for key in WEIGHT_KEYS:
        if key not in state:
            state[key] = params.get(key, defaults.get(key))
    return encode_state(state) if encoded else state


def missing_keys(state: Mapping[str, Any]) -> list[str]:
    """Return the keys without which `state` (no prefix) does not describe a layer."""
    present = {key for key, value in state.items() if value is not None}
    if "meta" in present:
        return [] if "W_q" in present else ["W_q"]
    missing = [key for key in _REQUIRED if key not in present]
    if "zero_scale" not in present:
        missing += [key for key in ("scale", "zero") if not {key, f"{key}_q"} & present]
    return missing


def unexpected_keys(state: Mapping[str, Any]) -> list[str]:
    """Return the keys of `state` (no prefix) that no version of the format has."""
    return [key for key in state if key not in _KNOWN and key.partition(".")[0] not in NESTED_KEYS]


def load_layer_state(layer: QuantizedModule, state: Mapping[str, Any]) -> None:
    """Make `layer` hold what `state` (no prefix; encoded or raw, of any version) describes; `state` is not changed.

    Raises ShapeError if the layer has a weight of another shape, CorruptCheckpointError for values that are not
    what their keys say, and what decoding raises. The layer is only changed once everything has been read.
    """
    decoded = decode_state(state)
    meta = _mapping(decoded["meta"], "meta") if "meta" in decoded else decoded
    meta.setdefault("group_size", None)
    _check_types(decoded, meta)
    q = qtensor_from_meta(decoded["W_q"], meta)
    _check_values(q, layer.compute_dtype)
    expected = layer._spec.shape if layer._spec is not None else layer._declared_shape
    if expected is not None and q.spec.shape != expected:
        raise ShapeError(f"got a quantised weight of shape {q.spec.shape}; the layer's is {expected}")
    if len(q.spec.shape) != 2:
        raise ShapeError(f"got a quantised weight of shape {q.spec.shape}; expected two dimensions [out, in]")
    bias = decoded.get("bias")
    if bias is not None and bias.shape != (q.spec.shape[0],):
        raise ShapeError(f"got a bias of shape {tuple(bias.shape)}; expected ({q.spec.shape[0]},)")
    layer.quant_config = _quant_config(decoded, meta)
    layer.offload_meta = bool(decoded.get("offload_meta") or False)
    layer._set_qtensor(q)
    layer.bias = None if bias is None else bias.detach().to(layer.device, layer.compute_dtype)
    layer._features_from_shape()


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise CorruptCheckpointError(f"got {key} of type {type(value).__name__}; expected a dict")
    return dict(value)


def _check_types(decoded: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Raise CorruptCheckpointError for values of a type that no version writes."""
    values = [(key, decoded.get(key)) for key in ("W_q", "bias")]
    for part in (meta, *(_mapping(meta[key], key) for key in NESTED_KEYS if meta.get(key) is not None)):
        values += [(key, part.get(key)) for key in ("scale", "zero", *QUANTIZED_STAT_KEYS)]
        shape = part.get("shape")
        if not isinstance(shape, (tuple, list)) or not all(isinstance(s, int) and s > 0 for s in shape):
            raise CorruptCheckpointError(f"got shape={shape!r}; expected positive integers")
    for key, value in values:
        if value is not None and not isinstance(value, Tensor):
            raise CorruptCheckpointError(f"got {key} of type {type(value).__name__}; expected a tensor")


def _check_values(q: QTensor, compute_dtype: torch.dtype) -> None:
    """Raise CorruptCheckpointError unless all scales and zeros are finite, and stay so in `compute_dtype`."""
    for name, stat in (("scale", q.scale), ("zero", q.zero)):
        if isinstance(stat, QTensor):
            _check_values(stat, compute_dtype)
            continue
        if stat.device.type == "meta" or bool(torch.isfinite(stat.to(compute_dtype)).all()):
            continue
        if bool(torch.isfinite(stat).all()):
            raise WeightError(
                f"got a {name} of {float(stat.abs().max()):.3g}, beyond {compute_dtype}'s largest "
                f"{torch.finfo(compute_dtype).max:.3g}; load into a layer with compute_dtype={stat.dtype}"
            )
        raise CorruptCheckpointError(
            f"got a {name} with NaN or infinite values; expected finite ones. The file is damaged, or the layer it "
            "was written from was"
        )


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

    bias: nn.Parameter | None
    encoded_state_dict: bool

    def state_dict_keys(self) -> set[str]:
        """Return the keys of the wire format."""
        return {*LAYER_KEYS, "bias"}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the layer's state; a layer without a weight gives every key with None."""
        if not self.is_initialized() and not args and kwargs.get("destination") is None:
            return dict.fromkeys(self.state_dict_keys())
        return super().state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self.is_initialized():
            return
        for key, value in layer_state(self, self.encoded_state_dict).items():  # type: ignore[arg-type]
            detached = isinstance(value, Tensor) and not keep_vars
            destination[prefix + key] = value.detach() if detached else value

    def load_state_dict(
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
        waiting = {key for key in own if key.startswith("linear_layer.")}
        own = {key: value for key, value in own.items() if key not in waiting}
        if waiting and not own:
            return  # not quantised yet: the module in linear_layer reads its own keys
        absent = missing_keys(own)
        unexpected.extend(prefix + key for key in unexpected_keys(own))
        if absent:
            missing.extend(prefix + key for key in absent)
            return
        if self.bias is not None and "bias" not in own:
            missing.append(prefix + "bias")
            own["bias"] = self.bias
        try:
            load_layer_state(self, own)  # type: ignore[arg-type]
        except HQQError as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")

    def is_initialized(self) -> bool:
        raise NotImplementedError

    def _features_from_shape(self) -> None:
        """Set the attributes that follow from the shape of the weight."""
        raise NotImplementedError
