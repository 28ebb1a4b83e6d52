"""`PeftUtils`: adding the library's own adapters to a model, merging, casting, saving and loading them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from hqq.core.adapter import SETTINGS, LinearAdapter, PeftConfig
from hqq.core.adapter_file import read_adapters, write_adapters
from hqq.core.config import QuantConfig, is_config_dict
from hqq.core.linear import HQQLinear
from hqq.core.lora import HQQLinearLoRA
from hqq.core.modules import linear_tag, matches, name_modules, named_sites, replace_module
from hqq.core.weight_adapters import HQQLinearGroupedProj, HQQLinearLoRAWithFakeQuant
from hqq.errors import ConfigError, MissingKeysError

__all__ = [
    "ADAPTERS",
    "HQQLinearGroupedProj",
    "HQQLinearLoRA",
    "HQQLinearLoRAWithFakeQuant",
    "PeftUtils",
    "is_hqq_lora_layer",
    "patch_linear_add_peft",
    "patch_linear_cast_peft",
    "patch_linear_merge_peft",
]

ADAPTERS: Mapping[str, type[LinearAdapter]] = {
    "default": HQQLinearLoRA,
    "lora_with_fakequant": HQQLinearLoRAWithFakeQuant,
    "grouped_proj": HQQLinearGroupedProj,
}
"""The values of `lora_type`."""


def is_hqq_lora_layer(layer: object) -> bool:
    """Whether `layer` is one of the library's adapters."""
    return isinstance(layer, LinearAdapter)


def patch_linear_add_peft(layer: nn.Module, patch_params: PeftConfig | None) -> nn.Module:
    """Return `layer` inside an adapter of these settings, or `layer` itself if they are None."""
    return layer if not patch_params else _adapter_class(patch_params)(layer, patch_params)


def patch_linear_merge_peft(
    layer: nn.Module, patch_params: Mapping[str, Any] | QuantConfig | None
) -> nn.Module:
    """Return the merged layer if `layer` is an adapter (see `merge_and_quantize`), else `layer` itself."""
    return layer.merge_and_quantize(patch_params) if isinstance(layer, LinearAdapter) else layer


def patch_linear_cast_peft(layer: nn.Module, patch_params: torch.dtype) -> nn.Module:
    """Cast `layer` in place if it is an adapter, and return it."""
    return layer.cast(patch_params) if isinstance(layer, LinearAdapter) else layer


def _adapter_class(config: PeftConfig) -> type[LinearAdapter]:
    lora_type = config.get("lora_type", "default")
    if lora_type not in ADAPTERS:
        raise ConfigError(f"got lora_type={lora_type!r}; expected one of {', '.join(ADAPTERS)}")
    return ADAPTERS[lora_type]


def _adapters(model: nn.Module) -> dict[LinearAdapter, tuple[str, ...]]:
    """Return the adapters of `model` with all their names; raises ConfigError if there is none."""
    found = {m: names for m, names in named_sites(model).items() if isinstance(m, LinearAdapter)}
    if not found:
        raise ConfigError(
            f"got a {type(model).__name__} without adapters; call PeftUtils.add_lora(model, ...) first"
        )
    return found


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """Yield the linear layers of `model` with all their names."""
    for module, names in named_sites(model).items():
        # Subclasses of nn.Linear may be read rather than called, as the one in nn.MultiheadAttention is.
        if type(module) is nn.Linear or isinstance(module, HQQLinear):
            yield module, names


def _by_layer(names_of: Mapping[Any, tuple[str, ...]], params: Mapping[str, Any]) -> dict[nn.Module, Any]:
    """Return what `params` says for each layer that it says something for: name before tag before glob.

    Raises ConfigError for a key that fits no layer, unless its value is None.
    """
    names = {module: all_names[0] for module, all_names in names_of.items()}
    unused = [
        k
        for k, value in params.items()
        if value is not None and not any(matches(n, k) for n in names.values())
    ]
    if unused:
        tags = sorted({linear_tag(name) for name in names.values()})
        raise ConfigError(
            f"got parameters for {unused}, which fit no layer; expected some of {', '.join(tags)}"
        )
    chosen = {}
    for module, name in names.items():
        fitting = [key for key in params if matches(name, key)]
        if fitting:
            exact = [key for key in (name, linear_tag(name)) if key in params]
            chosen[module] = params[(exact or fitting)[0]]
    return chosen


class PeftUtils:
    """The library's own adapters on whole models. `base_class` is accepted and not needed: any model will do."""

    @classmethod
    def add_lora(
        cls, model: nn.Module, lora_params: Mapping[str, Any], base_class: object = None, verbose: bool = True
    ) -> None:
        """Freeze `model` and put adapters around its linear layers, in place.

        Args:
            model: any model with nn.Linear or HQQLinear layers.
            lora_params: `{name, tag or glob: settings}`, None for layers to leave alone, as in
                `{"self_attn.q_proj": {"lora_type": "default", "r": 32, "lora_alpha": 64}}`; or the settings of every
                linear layer but `lm_head`. See the classes in `ADAPTERS` for the settings.
            verbose: show a progress bar.

        Raises ConfigError for settings that cannot be used, keys that fit no layer, and a model that has adapters;
        the model is unchanged then.
        """
        if any(is_hqq_lora_layer(module) for module in model.modules()):
            raise ConfigError(
                "got a model that has adapters already; merge them first with PeftUtils.merge_lora"
            )
        names_of = dict(_linears(model))
        if lora_params and set(lora_params) <= set(SETTINGS):
            config = lora_params
            lora_params = {linear_tag(names[0]): config for names in names_of.values()}
            lora_params.pop("lm_head", None)
        chosen = {module: config for module, config in _by_layer(names_of, lora_params).items() if config}
        for module, config in chosen.items():
            _adapter_class(config).check(module, config)
        model.requires_grad_(False)
        for module, config in tqdm(chosen.items(), desc="add adapters", disable=not verbose):
            replace_module(model, names_of[module], patch_linear_add_peft(module, config))
        name_modules(model)
        model.peft_config = {
            key: None if config is None else dict(config) for key, config in lora_params.items()
        }  # type: ignore[assignment]

    @classmethod
    def merge_lora(
        cls,
        model: nn.Module,
        merge_lora_params: Mapping[str, Any] | QuantConfig | None = None,
        base_class: object = None,
        verbose: bool = True,
    ) -> None:
        """Replace every adapter by one merged layer, in place.

        merge_lora_params: a quantisation config for all, or `{name, tag or glob: config}`; what has none becomes a
        dequantised nn.Linear. Raises ConfigError for a key that fits no adapter, and what quantising raises; layers
        merged until then stay merged.
        """
        adapters = _adapters(model)
        params = merge_lora_params
        if params is None or isinstance(params, QuantConfig) or is_config_dict(params):
            params = {"*": params}
        configs = _by_layer(adapters, params)
        for module, names in tqdm(adapters.items(), desc="merge adapters", disable=not verbose):
            replace_module(model, names, patch_linear_merge_peft(module, configs.get(module)))
        name_modules(model)
        del model.peft_config

    @classmethod
    def cast_lora_weights(
        cls, model: nn.Module, dtype: torch.dtype, base_class: object = None, verbose: bool = True
    ) -> None:
        """Cast the adapters to `dtype`, such as the compute dtype for faster inference; ConfigError without any."""
        for adapter in _adapters(model):
            patch_linear_cast_peft(adapter, dtype)

    @classmethod
    def save_lora_weights(
        cls, model: nn.Module, filename: str | PathLike[str], base_class: object = None, verbose: bool = True
    ) -> None:
        """Write settings and adapters, not the model, to `filename`, in the original's format.

        The file is `torch.save({"peft_config": {tag: settings}, "parameters": {layer name: adapter_state()}})`.
        Raises ConfigError if the model has no adapters.
        """
        parameters = {names[0]: adapter.adapter_state() for adapter, names in _adapters(model).items()}
        write_adapters(filename, _peft_config(model), parameters)

    @classmethod
    def load_lora_weights(
        cls, model: nn.Module, filename: str | PathLike[str], base_class: object = None, verbose: bool = True
    ) -> None:
        """Load adapters that `save_lora_weights` (or the original) wrote, adding them first if `model` has none.

        Values are cast to the adapters' own dtype. Nothing in the file is executed. Raises CorruptCheckpointError for
        a file that is none of adapters, MissingKeysError or ShapeError for adapters that do not fit the model, and
        ConfigError for a file of version 0.1, which has no settings, if the model has no adapters.
        """
        config, parameters = read_adapters(filename)
        if not any(is_hqq_lora_layer(module) for module in model.modules()):
            if config is None:
                raise ConfigError(
                    "got adapters without settings (version 0.1); call PeftUtils.add_lora first"
                )
            cls.add_lora(model, config, verbose=verbose)
        adapters = {names[0]: adapter for adapter, names in _adapters(model).items()}
        missing, unknown = sorted(adapters.keys() - parameters), sorted(parameters.keys() - adapters)
        if missing or unknown:
            raise MissingKeysError(
                f"got a file without adapters for {missing} and with adapters for {unknown}, which the model does not "
                "have; expected the model and the settings that it was saved with"
            )
        for name, adapter in adapters.items():
            adapter.load_adapter_state(parameters[name])


def _peft_config(model: nn.Module) -> Mapping[str, PeftConfig | None]:
    config = getattr(model, "peft_config", None)
    if isinstance(config, Mapping):
        return config
    return {names[0]: adapter.peft_config for adapter, names in _adapters(model).items()}
