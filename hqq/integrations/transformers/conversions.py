"""Which of transformers' weight conversions may still be reversed when a quantised model is saved."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.core_model_loading import WeightConverter

from hqq.core.experts import HQQExperts
from hqq.core.quantized_module import QuantizedModule
from hqq.integrations.transformers.operations import LayerConverter


def keep_reversible(model: nn.Module) -> None:
    """Drop the conversions of `model` that would take quantised tensors apart as if they were weights.

    Saving reverses the conversions that loading applied: it would split fused experts into single matrices, and undo
    our own. Renamings stay, and conversions of weights that are not quantised, so that other versions find the names
    they know; but no other version knows fused experts as codes, and a model that has them keeps its own names.
    """
    if any(isinstance(module, HQQExperts) for module in model.modules()):
        model._weight_conversions = []  # type: ignore[assignment]
        return
    conversions: Any = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = _default_conversions(model)
    names = [f"{name}.W_q" for name, module in model.named_modules() if isinstance(module, QuantizedModule)]
    model._weight_conversions = [c for c in conversions if not _takes_apart(c, names)]  # type: ignore[assignment]


def _default_conversions(model: Any) -> list[Any]:
    from transformers import conversion_mapping, core_model_loading

    found = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    # As transformers does for a model that no checkpoint was loaded into: it does not know of a prefix to restore.
    prefix_change = getattr(core_model_loading, "PrefixChange", ())
    return [conversion for conversion in found if not isinstance(conversion, prefix_change)]


def _takes_apart(conversion: Any, names: list[str]) -> bool:
    if isinstance(conversion, LayerConverter):
        return True
    if not isinstance(conversion, WeightConverter):
        return False
    reverse = conversion.reverse_transform()
    return any(reverse.rename_source_key(name)[1] is not None for name in names)
