"""Which weights of a transformers model are quantised, how, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hqq.core.config import LegacyConfig, is_config_dict
from hqq.core.experts import expert_parameters
from hqq.core.modules import linear_tag, matches, skip_rule
from hqq.errors import ConfigError
from hqq.models.candidates import examine
from hqq.models.weight_readers import weight_readers


@dataclass
class Plan:
    """What to quantise: configurations by the name of the parameter; `left` holds the reason for every other one."""

    weights: dict[str, LegacyConfig] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def plan(model: nn.Module, quant_config: Mapping[str, Any], skip_modules: Sequence[str] | None) -> Plan:
    """Return what `quant_config`, one configuration or a dict of them by layer tag, means for `model`.

    Candidates are the weights of nn.Linear layers and fused expert parameters. Skipped are those that one of
    `skip_modules` names (a name, a part of it, or a glob) and those that share their tensor with an embedding.
    Raises ConfigError if a dict by tag names no layer of the model.
    """
    tied = tied_parameters(model)
    found = Plan()
    names = list(candidates(model))
    for name, layer, obstacle in names:
        rule = skip_rule(layer, skip_modules or ())
        config = config_of(layer, quant_config)
        if rule is not None:
            found.left[name] = f"skip_modules has {rule!r}"
        elif obstacle is not None:
            found.left[name] = obstacle
        elif name in tied:
            found.left[name] = "it is tied to another parameter"
        elif config is None:
            found.left[name] = "the configuration names other layers only"
        else:
            found.weights[name] = config
    if not is_config_dict(quant_config) and not any(config_of(layer, quant_config) for _, layer, _ in names):
        tags = sorted({linear_tag(layer) for _, layer, _ in names})
        raise ConfigError(
            f"got a configuration for {', '.join(quant_config)}; the model's layers are {', '.join(tags)}"
        )
    return found


def candidates(model: nn.Module) -> Iterator[tuple[str, str, str | None]]:
    """Yield (parameter name, layer name, None or why it cannot be quantised) of what could be quantised."""
    readers = weight_readers(model)
    for layer, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield f"{layer}.weight", layer, _obstacle(module, readers)
    for name, _, _ in expert_parameters(model):
        yield name, name, None


def _obstacle(module: nn.Linear, readers: Mapping[nn.Module, str]) -> str | None:
    if module in readers:
        return f"{readers[module]} reads this layer's weight directly"
    candidate = examine(module)
    return None if candidate is None else candidate.reason


def config_of(layer: str, quant_config: Mapping[str, Any]) -> LegacyConfig | None:
    """Return the configuration of the layer (or fused parameter) called `layer`, or None if none is for it."""
    if is_config_dict(quant_config):
        return dict(quant_config)
    for pattern, config in quant_config.items():
        if matches(layer, pattern):
            return None if config is None else dict(config)
    return None


def tied_parameters(model: nn.Module) -> set[str]:
    """Return the names of all parameters that are tied to another one."""
    keys: Any = getattr(model, "all_tied_weights_keys", None)
    return {*keys, *keys.values()} if isinstance(keys, Mapping) else set()
