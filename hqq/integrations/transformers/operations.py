"""How transformers 5 hands over weights: conversion operations, run while a checkpoint is being loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from hqq.errors import HQQError
from hqq.integrations.transformers.keys import STATE_KEYS
from hqq.integrations.transformers.layers import load_parameter, quantize_parameter, share_tied

if TYPE_CHECKING:
    from hqq.integrations.transformers.session import Session


class _Operation(ConversionOps):
    def __init__(self, session: Session) -> None:
        self.session = session
        # transformers leaves the dtype of what it loads alone if the operation has this attribute.
        self.hf_quantizer = session.hf_quantizer

    def __deepcopy__(self, memo: Any) -> _Operation:
        return self  # it is copied for every tensor, with everything it refers to

    def _found(self, name: str, arguments: dict[str, Any]) -> None:
        missing = arguments.get("missing_keys")
        if missing is not None:
            missing.discard(name)


class QuantizeWeights(_Operation):
    """Quantises full weights and puts the layers in place; what is not to be quantised passes through."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **kwargs: Any
    ) -> dict[str, Any]:
        rest: dict[str, Any] = {}
        for name, value in input_dict.items():
            config = self.session.plan.weights.get(name)
            if config is None:
                rest[name] = value
                continue
            tensor: Tensor = value[0] if isinstance(value, list) else value
            try:
                quantize_parameter(self.session.model, name, tensor, config)
            except HQQError as error:
                self.session.failed[name] = error
            self._found(name, kwargs)
        return rest


class LoadLayers(_Operation):
    """Builds quantised layers from the keys of a quantised checkpoint and puts them in place."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **kwargs: Any
    ) -> dict[str, Any]:
        name: str = kwargs["full_layer_name"]
        state = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        try:
            load_parameter(self.session.model, name, state, self.session.dtype_of(name))
            for other in share_tied(self.session.model, name):
                self._found(other, kwargs)
        except HQQError as error:
            self.session.failed[name] = error
        self._found(name, kwargs)
        return {}


class LayerConverter(WeightConverter):
    """Collects the keys of each quantised layer under the name of the parameter that they stand for."""

    def __init__(self, operation: LoadLayers) -> None:
        super().__init__(source_patterns=list(STATE_KEYS), target_patterns=["weight"], operations=[operation])
        self.operation = operation

    def __deepcopy__(self, memo: Any) -> LayerConverter:
        return LayerConverter(self.operation)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Return the parameter that `source_key` belongs to and the layer's key, or `source_key` and None."""
        return self.operation.session.split(source_key) or (source_key, None)
