"""HQQtimm: a timm vision model that quantises and saves itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hqq.engine.base import HQQWrapper
from hqq.errors import CheckpointError
from hqq.models.base import BaseHQQModel
from hqq.models.checkpoint.layout import CONFIG, read_json
from hqq.models.checkpoint.skeleton import empty_weights

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
