"""The methods of transformers 4.57's HqqHfQuantizer that lose the dtype, replaced.

4.57 hands over one tensor at a time. Weights are quantised as they come; the keys of a quantised layer are collected
until the layer is complete.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from hqq.core.modules import name_modules
from hqq.core.quantized_module import QuantizedModule
from hqq.errors import HQQError, MissingKeysError
from hqq.integrations.transformers.finish import finish
from hqq.integrations.transformers.layers import load_parameter, quantize_parameter, share_tied
from hqq.integrations.transformers.quantizer import (
    get_state_dict_and_metadata,
    refuse_quantized_keys,
    session_of,
    validate_environment,
)
from hqq.integrations.transformers.session import Session


class LegacySession(Session):
    """A session that also collects the keys of layers that are not complete yet."""

    def __init__(self, hf_quantizer: Any, model: nn.Module) -> None:
        super().__init__(hf_quantizer, model)
        self.collected: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self.expected: dict[str, set[str]] = defaultdict(set)
        self.absent: set[str] = set()

    def is_loaded(self, name: str) -> bool:
        """Whether the parameter called `name` came from the checkpoint, as it is or as codes."""
        return name not in self.absent


def before_loading(self: Any, model: nn.Module, **kwargs: Any) -> nn.Module:
    name_modules(model)
    LegacySession(self, model).start()
    return model


def after_loading(self: Any, model: nn.Module, **kwargs: Any) -> nn.Module:
    session = session_of(self)
    try:
        finish(session)
    finally:
        session.end()
    return model


def update_expected_keys(
    self: Any, model: nn.Module, expected_keys: Sequence[str], loaded_keys: Sequence[str]
) -> list[str]:
    """Replace the weight of every layer that `loaded_keys` has codes for by the keys of its codes."""
    session: Any = session_of(self)
    if not self.pre_quantized:
        refuse_quantized_keys(loaded_keys)
        return list(expected_keys)
    replaced = set()
    for key in loaded_keys:
        found = session.split(key)
        if found is not None:
            replaced.add(found[0])
            session.expected[found[0]].add(found[1])
    codes = {key for key in loaded_keys if session.split(key) is not None}
    return [key for key in expected_keys if key not in replaced] + sorted(codes)


def update_missing_keys(
    self: Any, model: nn.Module, missing_keys: list[str], prefix: str, **kwargs: Any
) -> list[str]:
    """Return `missing_keys`; raises MissingKeysError if a quantised checkpoint lacks a layer or its bias."""
    session: Any = session_of(self)
    session.absent = set(missing_keys)
    if self.pre_quantized:
        biases = {f"{name.rpartition('.')[0]}.bias" for name in session.expected}
        names = [key for key in missing_keys if key in session.plan.weights or key in biases]
        session.refuse_absent(names)
    return missing_keys


def param_needs_quantization(self: Any, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
    session: Any = Session.of(self)
    if session is None or param_name in session.absent:
        return False
    if self.pre_quantized:
        return session.split(param_name) is not None or _belongs_to_layer(model, param_name)
    return param_name in session.plan.weights or _belongs_to_layer(model, param_name)


def create_quantized_param(
    self: Any, model: nn.Module, param_value: Tensor, param_name: str, target_device: Any, **kwargs: Any
) -> None:
    session: Any = session_of(self)
    value = param_value.to(target_device)
    try:
        if _belongs_to_layer(model, param_name):
            layer = model.get_submodule(param_name.rpartition(".")[0])
            layer.bias = nn.Parameter(value.to(layer.compute_dtype), requires_grad=False)  # type: ignore[arg-type]
        elif not self.pre_quantized:
            quantize_parameter(model, param_name, value, session.plan.weights[param_name])
        else:
            _collect(session, param_name, value)
    except HQQError as error:
        raise type(error)(f"{param_name}: {error}") from error


def _collect(session: LegacySession, key: str, value: Tensor) -> None:
    found = session.split(key)
    if found is None:
        raise MissingKeysError(f"got the key {key} of no layer of {type(session.model).__name__}")
    name, end = found
    session.collected[name][end] = value
    if set(session.collected[name]) == session.expected[name]:
        load_parameter(session.model, name, session.collected.pop(name), session.dtype_of(name))
        share_tied(session.model, name)


def _belongs_to_layer(model: nn.Module, name: str) -> bool:
    """Whether `name` is the bias of a layer that is quantised by now."""
    path, _, leaf = name.rpartition(".")
    if leaf != "bias":
        return False
    owner: nn.Module | None = model
    for part in path.split(".") if path else ():
        owner = owner._modules.get(part) if owner is not None else None
    return isinstance(owner, QuantizedModule)


METHODS: dict[str, Callable[..., Any]] = {
    "validate_environment": validate_environment,
    "get_state_dict_and_metadata": get_state_dict_and_metadata,
    "_process_model_before_weight_loading": before_loading,
    "_process_model_after_weight_loading": after_loading,
    "update_expected_keys": update_expected_keys,
    "update_missing_keys": update_missing_keys,
    "param_needs_quantization": param_needs_quantization,
    "create_quantized_param": create_quantized_param,
}
