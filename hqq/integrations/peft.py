"""HQQ inside PEFT: what PEFT's adapters leave out for HQQLinear.

Merging keeps the layer's bias, and `target_modules="all-linear"` finds quantised layers. Installed as soon as there is
an HQQLinear and PEFT is imported; nothing has to be called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import wraps
from importlib import import_module
from typing import Any

from torch import nn

from hqq.core.linear import HQQLinear

_MARK = "_hqq_repair"
_ALL_LINEAR = "all-linear"

Function = Callable[..., Any]


def install() -> tuple[str, ...]:
    """Repair the PEFT that is imported, once, and return what is repaired: dotted names of PEFT's functions.

    What a version of PEFT does not have is left out.
    """
    return tuple(name for name, wrap in _REPAIRS.items() if _install(name, wrap))


def _install(name: str, wrap: Callable[[Function], Function]) -> bool:
    path, _, attribute = name.rpartition(".")
    owner = _resolve(path)
    original = getattr(owner, attribute, None)
    if original is None:
        return False
    if not hasattr(original, _MARK):
        repaired = wrap(original)
        setattr(repaired, _MARK, True)
        # Functions are imported by name all over PEFT; methods are looked up in their class.
        owners = [owner] if isinstance(owner, type) else _modules_with(attribute, original)
        for each in owners:
            setattr(each, attribute, repaired)
    return True


def _resolve(path: str) -> Any:
    """Return the module, or the class in a module, called `path`; None if there is none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name) if name[:1].isupper() else import_module(path)
    except (ImportError, AttributeError):
        return None


def _modules_with(attribute: str, value: object) -> list[Any]:
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "peft"]
    return [module for module in modules if vars(module).get(attribute) is value]


def _keep_bias_of_self(merge: Function) -> Function:
    """For a method of an adapter that replaces its base layer."""

    @wraps(merge)
    def repaired(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = self.get_base_layer()
        result = merge(self, *args, **kwargs)
        _carry_over(before, self.get_base_layer())
        return result

    return repaired


def _keep_bias_of_argument(set_weight: Function) -> Function:
    """For a method of a quantisation backend that replaces the base layer of the adapter it is given."""

    @wraps(set_weight)
    def repaired(self: Any, peft_layer: Any, *args: Any, **kwargs: Any) -> Any:
        before = peft_layer.get_base_layer()
        result = set_weight(self, peft_layer, *args, **kwargs)
        _carry_over(before, peft_layer.get_base_layer())
        return result

    return repaired


def _carry_over(before: nn.Module, after: nn.Module) -> None:
    if after is before or not isinstance(before, HQQLinear) or not isinstance(after, HQQLinear):
        return
    if after.bias is None:
        after.bias = before.bias  # the parameter itself: it may be in training
    after.encoded_state_dict = before.encoded_state_dict
    after.train(before.training)
    if hasattr(before, "name"):
        after.name = before.name


def _include_quantized(include: Function) -> Function:
    """For the function that replaces "all-linear" by names of layers."""

    @wraps(include)
    def repaired(peft_config: Any, model: nn.Module) -> Any:
        asked = getattr(peft_config, "target_modules", None)
        result = include(peft_config, model)
        if isinstance(asked, str) and asked.lower() == _ALL_LINEAR:
            result.target_modules = {*result.target_modules, *_quantized_targets(model, peft_config)}
        return result

    return repaired


def _quantized_targets(model: nn.Module, peft_config: Any) -> Iterator[str]:
    """Yield the names of the quantised layers that are no output layer and in no adapter, as PEFT chooses nn.Linear."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    get_head = getattr(model, "get_output_embeddings", None)
    heads = [get_head()] if get_head is not None else []
    if heads == [None] and getattr(peft_config, "task_type", None) == "SEQ_CLS":
        heads = [getattr(model, name) for name in SEQ_CLS_HEAD_NAMES if hasattr(model, name)][:1]
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{prefix}.") for prefix in adapted)
        if isinstance(module, HQQLinear) and not inside and not any(module is head for head in heads):
            yield name


_REPAIRS: dict[str, Callable[[Function], Function]] = {
    "peft.tuners.lora.hqq.HqqLoraLinear.merge": _keep_bias_of_self,
    "peft.tuners.lora.hqq.HqqLoraLinear.unmerge": _keep_bias_of_self,
    "peft.utils.quantization_utils.HqqBackend.set_base_weight": _keep_bias_of_argument,
    "peft.tuners.tuners_utils._maybe_include_all_linear_layers": _include_quantized,
}
