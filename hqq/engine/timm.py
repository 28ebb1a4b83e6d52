"""HQQtimm: a timm vision model that quantises and saves itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from hqq.engine.base import HQQWrapper
from hqq.errors import CheckpointError
from hqq.models.base import BaseHQQModel
from hqq.models.checkpoint.layout import CONFIG, read_json
from hqq.models.checkpoint.skeleton import empty_weights


class TimmHQQModel(BaseHQQModel):
    """Builds the timm architecture that config.json names."""

    @classmethod
    def create_model(cls, save_dir: str, kwargs: dict[str, Any]) -> nn.Module:
        """Return the unquantised architecture; raises CheckpointError if config.json names none."""
        import timm  # type: ignore[import-not-found,unused-ignore]

        content = read_json(Path(save_dir) / CONFIG)
        architecture = content.get("architecture")
        if not isinstance(architecture, str):
            raise CheckpointError(f"got {CONFIG} without the name of a timm model under 'architecture'")
        with empty_weights():
            model: nn.Module = timm.create_model(architecture, pretrained=False, **_options(content))
        return model.eval()


def _options(content: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that the saved model was built with, as far as they are recorded."""
    options = dict(content.get("model_args") or {})
    if content.get("num_classes") is not None:
        options["num_classes"] = content["num_classes"]
    return options


class HQQtimm(HQQWrapper):
    """`create_model`, then `model.quantize_model(quant_config=...)` and `model.save_quantized(save_dir)`."""

    base_class = TimmHQQModel

    @classmethod
    def create_model(cls, *args: Any, **kwargs: Any) -> nn.Module:
        """Return the unquantised model; takes what timm.create_model takes."""
        import timm

        model: nn.Module = timm.create_model(*args, **kwargs)
        return cls.wrap(model)
