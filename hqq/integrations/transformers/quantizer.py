"""The methods that HqqHfQuantizer of transformers 5 lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hqq.core.experts import HQQExperts
from hqq.core.modules import name_modules
from hqq.errors import CheckpointError, ConfigError
from hqq.integrations.transformers.adopt import state_without_aliases
from hqq.integrations.transformers.finish import finish
from hqq.integrations.transformers.session import Session

# The attribute of the quantiser with the device_map of the model that is being loaded.
_DEVICE_MAP = "_hqq_device_map"
# Bits that scale and zero add to each weight of a group, for the estimate of how much room a layer needs.
_STAT_BITS = 32


def validate_environment(self: Any, *args: Any, **kwargs: Any) -> None:
    device_map = kwargs.get("device_map")
    if isinstance(device_map, dict) and "disk" in device_map.values():
        raise ConfigError(
            "got a device_map that puts layers on disk, from where HQQ layers cannot be read one by one; "
            "map them to GPUs or to the CPU"
        )
    # Called again with what "auto" comes to.
    setattr(self, _DEVICE_MAP, device_map)


def param_needs_quantization(self: Any, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
    session = Session.of(self)
    return session is not None and param_name in session.plan.weights


def param_element_size(self: Any, model: nn.Module, param_name: str, param: Any = None) -> float:
    session = Session.of(self)
    config = None if session is None else session.plan.weights.get(param_name)
    if config is None:
        return float(param.element_size())
    params = config["weight_quant_params"]
    return float((params["nbits"] + _STAT_BITS / (params["group_size"] or _STAT_BITS)) / 8)


def get_quantize_ops(self: Any) -> Any:
    from hqq.integrations.transformers.operations import QuantizeWeights

    return QuantizeWeights(session_of(self))


def get_weight_conversions(self: Any) -> list[Any]:
    from hqq.integrations.transformers.operations import LayerConverter, LoadLayers

    session = Session.of(self)
    return [] if session is None or not self.pre_quantized else [LayerConverter(LoadLayers(session))]


def update_weight_conversions(self: Any, weight_conversions: list[Any], *args: Any) -> list[Any]:
    # Ours first: at most one conversion takes a key, and some of the models' match anything under an expert.
    return [*self.get_weight_conversions(), *weight_conversions]


def before_loading(self: Any, model: nn.Module, **kwargs: Any) -> nn.Module:
    if not self.pre_quantized:
        refuse_quantized_files(kwargs.get("checkpoint_files"))
    name_modules(model)
    Session(self, model).start()
    return model


def after_loading(self: Any, model: nn.Module, **kwargs: Any) -> nn.Module:
    from hqq.integrations.transformers.conversions import keep_reversible

    session = session_of(self)
    try:
        finish(session)
    finally:
        session.end()
    refuse_offloaded_experts(model, getattr(self, _DEVICE_MAP, None))
    keep_reversible(model)
    return model


def refuse_offloaded_experts(model: nn.Module, device_map: object) -> None:
    """Raise ConfigError if a model on GPUs has fused experts on the CPU: only layers that are called are fetched."""
    places = set(device_map.values()) if isinstance(device_map, Mapping) else set()
    if not places - {"cpu", torch.device("cpu")}:
        return
    for name, module in model.named_modules():
        if isinstance(module, HQQExperts) and module.device.type == "cpu":
            raise ConfigError(
                f"got a device_map that leaves the fused experts {name} on the CPU beside GPUs, from where they "
                "cannot be fetched for each call; map them to GPUs (see max_memory), or the whole model to the CPU"
            )


def refuse_quantized_files(checkpoint_files: list[str] | None) -> None:
    """Raise CheckpointError if one of the files (safetensors) holds quantised layers already."""
    from safetensors import safe_open

    for path in checkpoint_files or ():
        if str(path).endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                refuse_quantized_keys(file.keys())


def refuse_quantized_keys(keys: Iterable[str]) -> None:
    """Raise CheckpointError if there are the keys of quantised layers among `keys`."""
    quantized = next((key for key in keys if key.endswith(".W_q")), None)
    if quantized is not None:
        raise CheckpointError(
            f"got a checkpoint that is quantised already (it has {quantized}), beside a config.json without "
            "quantization_config; load it with hqq.models.checkpoint.load_quantized and save it again"
        )


def get_state_dict_and_metadata(
    self: Any, model: nn.Module, *args: Any
) -> tuple[dict[str, Any], dict[str, str]]:
    return state_without_aliases(model), {}


def session_of(hf_quantizer: Any) -> Session:
    """Return the session of `hf_quantizer`, which is loading a model."""
    session = Session.of(hf_quantizer)
    if session is None:
        raise RuntimeError("HqqHfQuantizer is used outside of from_pretrained")
    return session


METHODS: dict[str, Callable[..., Any]] = {
    "validate_environment": validate_environment,
    "param_needs_quantization": param_needs_quantization,
    "param_element_size": param_element_size,
    "get_quantize_ops": get_quantize_ops,
    "get_weight_conversions": get_weight_conversions,
    "update_weight_conversions": update_weight_conversions,
    "get_state_dict_and_metadata": get_state_dict_and_metadata,
    "_process_model_before_weight_loading": before_loading,
    "_process_model_after_weight_loading": after_loading,
}
