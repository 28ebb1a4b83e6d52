"""HQQtimm: a timm vision model that quantises and saves itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hqq.core.quantized_module import QuantizedModule
from hqq.engine.base import HQQWrapper
from hqq.errors import CheckpointError
from hqq.models.base import BaseHQQModel
from hqq.models.calibration import CalibrationLike
from hqq.models.checkpoint.layout import CONFIG, read_json
from hqq.models.checkpoint.skeleton import empty_weights
from hqq.models.placement import DeviceMap

# What create_model takes that says where weights come from, not what the model is.
_SOURCES = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


class TimmHQQModel(BaseHQQModel):
    """Builds the timm architecture that config.json names."""

    @classmethod
    def create_model(cls, save_dir: str, kwargs: dict[str, Any]) -> nn.Module:
        """Return the unquantised architecture, parameters on the meta device.

        Raises CheckpointError if config.json names no architecture, or the model was built with arguments that JSON
        cannot hold.
        """
        import timm  # type: ignore[import-not-found,unused-ignore]

        content = read_json(Path(save_dir) / CONFIG)
        architecture, tag = content.get("architecture"), content.get("tag")
        if not isinstance(architecture, str):
            raise CheckpointError(f"got {CONFIG} without the name of a timm model under 'architecture'")
        if content.get("unrecorded_args"):
            raise CheckpointError(
                f"got a checkpoint of {architecture} built with {', '.join(content['unrecorded_args'])}, which "
                f"{CONFIG} cannot hold; build the model yourself and pass it: load_quantized(path, model=model)"
            )
        options = dict(content.get("model_args") or {})
        if content.get("num_classes") is not None:
            options["num_classes"] = content["num_classes"]
        # The pretrained settings of a tag decide on defaults such as the image size.
        name = f"{architecture}.{tag}" if tag else architecture
        with empty_weights():
            model: nn.Module = timm.create_model(name, pretrained=False, **options)
        note_arguments(model, tag or "", options)
        return model.eval()

    @classmethod
    def quantize_model(
        cls,
        model: nn.Module,
        quant_config: Mapping[str, Any],
        compute_dtype: torch.dtype = torch.float16,
        device: DeviceMap = None,
        calibration: CalibrationLike = None,
    ) -> nn.Module:
        """Quantise `model` in place, freeze it and return it; see `BaseHQQModel.quantize_model`."""
        _cast_constants(super().quantize_model(model, quant_config, compute_dtype, device, calibration))
        return model

    @classmethod
    def post_module_load(cls, model: nn.Module, weights: Mapping[str, Any]) -> None:
        """Finish a model that was just loaded."""
        _cast_constants(model)


def _cast_constants(model: nn.Module) -> None:
    """Cast the buffers that are not saved, as `model.to(dtype)` does: some of timm's models append them to biases."""
    modules = [module for module in model.modules() if not isinstance(module, QuantizedModule)]
    floats = (
        p.dtype for module in modules for p in module.parameters(recurse=False) if p.is_floating_point()
    )
    dtype = next(floats, None)
    for module in modules:
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.is_floating_point() and dtype is not None:
                module._buffers[name] = buffer.to(dtype)


class HQQtimm(HQQWrapper):
    """`create_model`, then `model.quantize_model(quant_config=...)` and `model.save_quantized(save_dir)`."""

    base_class = TimmHQQModel

    @classmethod
    def create_model(cls, *args: Any, **kwargs: Any) -> nn.Module:
        """Return the unquantised model; takes what timm.create_model takes."""
        import timm

        model: nn.Module = timm.create_model(*args, **kwargs)
        name = str(args[0] if args else kwargs.get("model_name", ""))
        given = {key: value for key, value in kwargs.items() if key != "model_name"}
        note_arguments(model, "" if ":" in name else name.partition(".")[2], given)
        return cls.wrap(model)


def note_arguments(model: nn.Module, tag: str, arguments: Mapping[str, Any]) -> None:
    """Keep on `model` what it was built with, for config.json: timm models do not say."""
    wanted = {key: value for key, value in arguments.items() if key not in _SOURCES}
    kept = {key: value for key, value in wanted.items() if _is_json(value)}
    if not hasattr(model, "config"):
        model.config = {  # type: ignore[assignment]
            "tag": tag,
            "model_args": kept,
            "unrecorded_args": [key for key in wanted if key not in kept],
        }


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
