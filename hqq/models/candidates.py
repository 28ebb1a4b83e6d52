"""Which modules hold a weight that could be quantised, and what stands in the way."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from hqq.core.experts import ExpertWeight
from hqq.core.quantized_module import QuantizedModule

# Classes with a forward of their own that computes what nn.Linear does.
_PLAIN_CLASSES = ("FalconLinear",)


class Candidate(NamedTuple):
    """A module with a weight: what kind it is, and why it cannot be quantised (None if it can).

    kind is "linear", "embedding" or "experts" (the fused matrices of all experts), or else the name of the class.
    """

    kind: str
    reason: str | None


def examine(module: nn.Module) -> Candidate | None:
    """Return what `module` is to quantisation, or None if it has no weight of its own with two or more dimensions."""
    if isinstance(module, QuantizedModule):
        return Candidate(type(module).__name__, "already quantised")
    if isinstance(module, nn.Linear):
        return Candidate("linear", _obstacle(module, nn.Linear))
    if isinstance(module, ExpertWeight):
        return Candidate("experts", None)
    if isinstance(module, nn.Embedding):
        reason = "max_norm changes the table at every look-up" if module.max_norm is not None else None
        return Candidate("embedding", reason or _obstacle(module, nn.Embedding))
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return Candidate(
            "Conv1D", "transformers' Conv1D stores its weight transposed; only nn.Linear is quantised"
        )
    if any(p is not None and p.ndim >= 2 for p in module._parameters.values()):
        return Candidate(type(module).__name__, "neither nn.Linear nor nn.Embedding")
    return None


def _obstacle(module: nn.Module, base: type[nn.Module]) -> str | None:
    """Return why a module of class `base` cannot be replaced, or None."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads this layer's weight directly"
    if is_parametrized(module) or not isinstance(module._parameters.get("weight"), torch.Tensor):
        return "its weight is computed from other parameters"
    own_forward = type(module).forward is not base.forward and type(module).__name__ not in _PLAIN_CLASSES
    if own_forward or "forward" in vars(module):
        return f"{type(module).__name__} computes with the weight in its own way (it overrides forward)"
    return None


def avoid_fused_paths(model: nn.Module) -> None:
    """Keep modules of torch that read their children's weights in a fused call from doing so where those are codes."""
    for module in model.modules():
        # The flags that these two classes ask before the fused call, and before nesting the batch for it.
        if isinstance(module, nn.TransformerEncoderLayer) and _holds_codes(module):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and _holds_codes(module):
            module.use_nested_tensor = False


def _holds_codes(module: nn.Module) -> bool:
    return any(isinstance(child, QuantizedModule) for child in module.modules())
