"""Casting quantised models: transformers refuses, or misreads, what our layers can do like any other module.

Its own `to` for HQQ models takes the first positional argument for a device, so `model.to(dtype=...)` fails, and `half`
and `float` refuse every quantised model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

_METHODS = ("to", "half", "float")
_MARK = "_hqq_casts"


def allow_casts() -> None:
    """Let HQQ models of transformers be moved and cast as any nn.Module; does nothing the second time."""
    from transformers.modeling_utils import PreTrainedModel
    from transformers.utils.quantization_config import QuantizationMethod

    if hasattr(PreTrainedModel, _MARK):
        return
    setattr(PreTrainedModel, _MARK, True)
    for name in _METHODS:
        theirs, plain = getattr(PreTrainedModel, name), getattr(nn.Module, name)
        setattr(PreTrainedModel, name, _plain_for_hqq(theirs, plain, QuantizationMethod.HQQ))


def _plain_for_hqq(theirs: Callable[..., Any], plain: Callable[..., Any], hqq: object) -> Callable[..., Any]:
    @wraps(theirs)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        is_hqq = getattr(self, "quantization_method", None) == hqq
        return (plain if is_hqq else theirs)(self, *args, **kwargs)

    return method
