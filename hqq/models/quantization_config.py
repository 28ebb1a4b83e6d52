"""The `quantization_config` of config.json, as transformers and the original read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from hqq.core.hooks import after_quantizing
from hqq.core.modules import linear_tag, named_sites
from hqq.core.quantized_module import QuantizedModule


def quantization_config(
    configs: Mapping[str, Mapping[str, Any]], left: Iterable[str], skip: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the description of a quantised model.

    Args:
        configs: nested configuration of each quantised layer, by name.
        left: names of the linear layers that are not quantised.
        skip: rules to list first in skip_modules.

    quant_config is one nested configuration if all layers have the same, else one per tag, or per name where the
    layers of a tag differ. skip_modules holds no text that is part of a quantised layer's name, since transformers
    4.x compares by substring.
    """
    described: dict[str, Any] = {}
    by_tag: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for name, config in configs.items():
        by_tag.setdefault(linear_tag(name), []).append((name, config))
    for tag, entries in by_tag.items():
        if all(config == entries[0][1] for _, config in entries):
            described[tag] = dict(entries[0][1])
        else:
            described.update({name: dict(config) for name, config in entries})
    distinct = list(described.values())
    single = bool(distinct) and all(config == distinct[0] for config in distinct)
    candidates = [*skip, *(linear_tag(name) for name in left)]
    skipped = [text for text in dict.fromkeys(candidates) if not any(text in name for name in configs)]
    return {
        "quant_method": "hqq",
        "quant_config": distinct[0] if single else described,
        "skip_modules": skipped,
    }


def layer_config(layer: QuantizedModule) -> dict[str, Any]:
    """Return the nested configuration of a quantised layer."""
    return {**(layer.quant_config or {}), "offload_meta": bool(layer.offload_meta)}


def describe_model(model: nn.Module, skip: Sequence[str] = ()) -> dict[str, Any]:
    """Return the `quantization_config` of a quantised model."""
    sites = named_sites(model)
    configs = {
        names[0]: layer_config(module)
        for module, names in sites.items()
        if isinstance(module, QuantizedModule) and module.is_initialized()
    }
    left = [names[0] for module, names in sites.items() if isinstance(module, nn.Linear)]
    return quantization_config(configs, left, skip)


def attach_config(model: nn.Module, described: Mapping[str, Any]) -> None:
    """Set `described` on the model's config, if it has one that takes attributes."""
    config = getattr(model, "config", None)
    if isinstance(config, dict):
        config["quantization_config"] = dict(described)
    elif hasattr(config, "__dict__"):
        config.quantization_config = dict(described)  # type: ignore[union-attr]
    after_quantizing(model)
