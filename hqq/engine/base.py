"""HQQWrapper: gives a model methods to quantise and save itself, as the original's engines do."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from hqq.errors import NotQuantizedError
from hqq.models.base import BaseHQQModel
from hqq.models.calibration import CalibrationLike
from hqq.models.placement import DeviceMap


def _quantize(
    model: nn.Module,
    quant_config: Any,
    compute_dtype: torch.dtype = torch.float16,
    device: DeviceMap = None,
    calibration: CalibrationLike = None,
) -> nn.Module:
    options: dict[str, Any] = {"compute_dtype": compute_dtype, "device": device, "calibration": calibration}
    return _base_class(model).quantize_model(model, quant_config, **options)


def _save(model: nn.Module, save_dir: str) -> None:
    if not getattr(model, "hqq_quantized", False):
        raise NotQuantizedError(
            "got a model that is not quantised; call model.quantize_model(quant_config=...) first"
        )
    _base_class(model).save_quantized(model, save_dir)


def _base_class(model: nn.Module) -> type[BaseHQQModel]:
    base_class: Any = model.base_class
    return base_class  # type: ignore[no-any-return]


class HQQWrapper:
    """Attaches `quantize_model` and `save_quantized` to models of `base_class`."""

    base_class: type[BaseHQQModel] = BaseHQQModel

    @classmethod
    def wrap(cls, model: nn.Module) -> nn.Module:
        """Return `model` with the two methods attached."""
        attached: dict[str, Any] = {
            "hqq_quantized": bool(getattr(model, "hqq_quantized", False)),
            "base_class": cls.base_class,
            "quantize_model": MethodType(_quantize, model),
            "save_quantized": MethodType(_save, model),
        }
        for name, value in attached.items():
            setattr(model, name, value)
        return model

    @classmethod
    def from_quantized(
        cls,
        save_dir_or_hub: str,
        compute_dtype: torch.dtype = torch.float16,
        device: DeviceMap = None,
        cache_dir: str | None = "",
        adapter: str | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        """Return the model of a quantised checkpoint; see `BaseHQQModel.from_quantized`."""
        return cls.wrap(
            cls.base_class.from_quantized(
                save_dir_or_hub, compute_dtype, device, cache_dir, adapter, **kwargs
            )
        )

    @classmethod
    def get_linear_tags(cls, model: nn.Module) -> list[str]:
        """Return the tags of the layers of `model` that are quantised."""
        cls.base_class.set_auto_linear_tags(model)
        tags: Any = model.linear_tags
        return list(tags)
