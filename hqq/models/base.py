"""The original's base classes for whole models, as thin forms of quantize_model, save_quantized and load_quantized."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import float16, nn

from hqq.core.config import is_config_dict
from hqq.core.devices import resolve_device
from hqq.core.linear import HQQLinear
from hqq.core.modules import is_leaf, linear_tag, name_modules, named_sites, replace_module
from hqq.models.calibration import CalibrationLike
from hqq.models.checkpoint import load_quantized, save_quantized
from hqq.models.checkpoint.disk import Disk
from hqq.models.checkpoint.layout import CONFIG, TORCH, locate
from hqq.models.checkpoint.model_source import ModelSource
from hqq.models.checkpoint.safetensors_writer import shards_by_blocks
from hqq.models.checkpoint.save import write_model
from hqq.models.checkpoint.torch_file import state_by_module
from hqq.models.lora_adapter import load_adapter
from hqq.models.placement import DeviceMap, block_names
from hqq.models.progress import progress_bar
from hqq.models.quantize import layer_tags, quantize_model

PatchLinear = Callable[[nn.Module, Any], nn.Module]

name_to_linear_tag = linear_tag


class BasePatch:
    """Walks a model's layers and replaces them by what a function returns."""

    @classmethod
    def get_linear_tags(cls) -> list[str]:
        """Return the tags of the layers to quantise; empty means all of the model's."""
        return []

    @classmethod
    def set_auto_linear_tags(cls, model: nn.Module, ignore: Sequence[str] = ("lm_head",)) -> None:
        """Set `model.linear_tags`, unless it is set."""
        if not hasattr(model, "linear_tags"):
            model.linear_tags = cls.get_linear_tags() or layer_tags(model, ignore)  # type: ignore[assignment]
            model.base_class = cls  # type: ignore[assignment]

    @classmethod
    def get_ignore_layers(cls, model: nn.Module) -> list[str]:
        """Return the names of modules that contain others."""
        return [names[0] for module, names in named_sites(model).items() if not is_leaf(module)]

    @classmethod
    def autoname_modules(cls, model: nn.Module) -> None:
        """Give every module its name as the attribute `name`."""
        name_modules(model)

    @classmethod
    def freeze_model(cls, model: nn.Module) -> None:
        """Switch off the gradient of every parameter."""
        model.requires_grad_(False)

    @classmethod
    def patch_linearlayers(
        cls,
        model: nn.Module,
        patch_fct: PatchLinear,
        patch_params: Mapping[str, Any] | None,
        verbose: bool = True,
    ) -> None:
        """Replace every linear layer by `patch_fct(layer, patch_params[tag])` (None for a tag without an entry)."""
        params = patch_params or {}
        _replace_leaves(model, True, lambda layer, tag: patch_fct(layer, params.get(tag)), verbose)

    @classmethod
    def patch_nonlinearlayers(
        cls, model: nn.Module, patch_fct: Callable[[nn.Module], nn.Module], verbose: bool = True
    ) -> None:
        """Replace every other module that contains none by `patch_fct(module)`."""
        _replace_leaves(model, False, lambda module, tag: patch_fct(module), verbose)

    @classmethod
    def patch_model(
        cls,
        model: nn.Module,
        patch_nonlinear_fct: Callable[[nn.Module], nn.Module],
        patch_linear_fct: PatchLinear,
        patch_params: Mapping[str, Any],
        verbose: bool = True,
    ) -> None:
        """Freeze and name the model, then patch all its layers."""
        model.eval()
        cls.freeze_model(model)
        cls.autoname_modules(model)
        cls.patch_nonlinearlayers(model, patch_nonlinear_fct, verbose)
        cls.patch_linearlayers(model, patch_linear_fct, patch_params, verbose)


def _replace_leaves(
    model: nn.Module, linear: bool, patch: Callable[[nn.Module, str], nn.Module], verbose: bool
) -> None:
    chosen = [
        (module, names)
        for module, names in named_sites(model).items()
        if is_leaf(module) and names[0] and isinstance(module, (nn.Linear, HQQLinear)) is linear
    ]
    with progress_bar(len(chosen), "Patching", verbose) as bar:
        for module, names in chosen:
            new = patch(module, linear_tag(names[0]))
            if new is not module:
                replace_module(model, names, new)
            bar.update()


class BaseHQQModel(BasePatch):
    """Quantise, save and load; subclasses may say how their architecture is built (`create_model`)."""

    @classmethod
    def create_model(cls, save_dir: str, kwargs: dict[str, Any]) -> nn.Module | None:
        """Return the unquantised architecture of the checkpoint in `save_dir`; None lets config.json decide."""
        return None

    @classmethod
    def cache_model(cls, model: nn.Module, save_dir: str) -> None:
        """Write files of one's own beside a checkpoint; called after it is in place. config.json is there already."""

    @classmethod
    def post_module_load(cls, model: nn.Module, weights: dict[str, Any]) -> None:
        """Finish a model after loading; everything in the checkpoint is in place by then, and `weights` is empty."""

    @classmethod
    def get_config_file(cls, save_dir: str) -> str:
        """Return the path of config.json."""
        return str(Path(save_dir) / CONFIG)

    @classmethod
    def get_weight_file(cls, save_dir: str) -> str:
        """Return the path of qmodel.pt."""
        return str(Path(save_dir) / TORCH)

    @classmethod
    def save_weights(cls, weights: dict[str, Any], save_dir: str) -> None:
        """Write {module name: state} as qmodel.pt."""
        torch.save(weights, cls.get_weight_file(save_dir))

    @classmethod
    def load_weights(cls, save_dir: str, map_location: Any = None) -> Any:
        """Return the content of qmodel.pt, which may hold tensors and plain values only."""
        return torch.load(cls.get_weight_file(save_dir), map_location=map_location, weights_only=True)

    @classmethod
    def serialize_weights(cls, model: nn.Module, verbose: bool = False) -> dict[str, dict[str, Any]]:
        """Return {module name: state} of a quantised model."""
        return state_by_module(ModelSource(model))

    @classmethod
    def setup_model(cls, model: nn.Module) -> None:
        """Name the modules and set `model.linear_tags`."""
        cls.autoname_modules(model)
        cls.set_auto_linear_tags(model)

    @classmethod
    def quantize_model(
        cls,
        model: nn.Module,
        quant_config: Mapping[str, Any],
        compute_dtype: torch.dtype = float16,
        device: DeviceMap = None,
        calibration: CalibrationLike = None,
    ) -> nn.Module:
        """Quantise `model` in place, freeze it and return it.

        quant_config: one nested configuration, or one per tag; see `hqq.quantize_model`. device: None means CUDA where
        it is present, else the CPU. calibration: see `hqq.quantize_model`. A model that is quantised already is
        returned with a warning.
        """
        if getattr(model, "hqq_quantized", False):
            warnings.warn("the model is already quantised; it stays as it is", UserWarning, stacklevel=2)
            return model
        tags = set(cls.get_linear_tags())
        if tags and is_config_dict(quant_config):
            quant_config = {tag: quant_config for tag in layer_tags(model) if tag in tags}
        target = resolve_device(None) if device is None else device
        quantize_model(
            model, quant_config, compute_dtype=compute_dtype, device=target, calibration=calibration
        )
        cls.freeze_model(model)
        model.base_class = cls  # type: ignore[assignment]
        return model.eval()

    @classmethod
    def save_quantized(cls, model: nn.Module, save_dir: str, verbose: bool = False) -> None:
        """Write qmodel.pt and config.json to the directory `save_dir`."""
        save_quantized(model, save_dir, format="pt")
        cls.cache_model(model, save_dir)

    @classmethod
    def try_snapshot_download(cls, save_dir_or_hub: str, cache_dir: str | None = "") -> str:
        """Return the directory of a checkpoint: inside `cache_dir`, as given, or downloaded from the hub."""
        local = Path(cache_dir or "") / save_dir_or_hub
        return str(locate(local if local.is_dir() else save_dir_or_hub, cache_dir or None))

    @classmethod
    def from_quantized(
        cls,
        save_dir_or_hub: str,
        compute_dtype: torch.dtype = float16,
        device: DeviceMap = None,
        cache_dir: str | None = "",
        adapter: str | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        """Return the model of a checkpoint of either format, frozen.

        device: None means CUDA where it is present. adapter: file of LoRA weights inside the checkpoint. kwargs:
        attn_implementation.
        """
        save_dir = cls.try_snapshot_download(save_dir_or_hub, cache_dir)
        options = {key: kwargs.pop(key) for key in ("attn_implementation",) if key in kwargs}
        if kwargs:
            warnings.warn(f"ignoring unknown arguments {', '.join(kwargs)}", UserWarning, stacklevel=2)
        model = load_quantized(
            save_dir,
            device=resolve_device(None) if device is None else device,
            compute_dtype=compute_dtype,
            model=cls.create_model(save_dir, dict(options)),
            config_options=options,
        )
        cls.freeze_model(model)
        cls.post_module_load(model, {})
        model.save_dir, model.base_class = save_dir, cls  # type: ignore[assignment]
        if adapter is not None:
            load_adapter(model, str(Path(save_dir) / adapter), compute_dtype, cls)
        return model

    @classmethod
    def save_to_safetensors(
        cls, model: nn.Module, save_dir: str, num_blocks_per_file: int = 5, verbose: bool = True
    ) -> None:
        """Write the model as safetensors with `num_blocks_per_file` blocks in a file; transformers can read it."""
        blocks = block_names(model)
        write_model(
            model,
            save_dir,
            "safetensors",
            lambda units: shards_by_blocks(units, blocks, num_blocks_per_file),
            True,
            Disk(),
        )
        cls.cache_model(model, save_dir)
