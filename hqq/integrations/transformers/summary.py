"""What share of a model is quantised, in one line, so that a large part left out does not go unnoticed."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from hqq.core.experts import HQQExperts
from hqq.core.quantized_module import QuantizedModule

_logger = logging.getLogger(__name__)

# Above this share of parameters that could be quantised, are not, and were not asked to be left: a warning.
_LEFT_OUT = 0.1


@dataclass(frozen=True)
class Summary:
    """How a loaded model is stored.

    layers, experts: quantised layers and fused expert parameters. parameters: weights in the whole model, biases,
    norms and embeddings included; quantized: those of them that are codes. bits: effective bits per weight of the
    whole model, scales and zeros included. left: names of what could be quantised and is not, with the reason.
    """

    layers: int
    experts: int
    parameters: int
    quantized: int
    bits: float
    left: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        share = self.quantized / max(self.parameters, 1)
        experts = f" and {self.experts} fused expert weights" if self.experts else ""
        return (
            f"{self.layers} layers{experts} quantised: {share:.1%} of {self.parameters} parameters, "
            f"{self.bits:.2f} bits per weight over the whole model, {len(self.left)} left as they were"
        )


def summarize(model: nn.Module, left: Mapping[str, str]) -> Summary:
    """Return how `model` is stored; `left` says why what is not quantised is not."""
    layers = experts = parameters = quantized = total_bytes = 0
    inside: set[int] = set()
    seen: set[object] = set()
    for module in model.modules():
        if not isinstance(module, QuantizedModule) or id(module) in inside:
            continue
        inside.update(id(part) for part in module.modules())
        tensors = [*module.parameters(), *module.buffers()]
        key = module.codes_key()
        if key is None or key in seen:
            continue
        seen.add(key)
        seen.update(id(tensor) for tensor in tensors)
        count = math.prod(module.stored_shape())
        quantized += count
        parameters += count + (0 if module.bias is None else module.bias.numel())
        total_bytes += sum(tensor.nbytes for tensor in tensors)
        experts += isinstance(module, HQQExperts)
        layers += not isinstance(module, HQQExperts)
    for parameter in model.parameters():
        if id(parameter) not in seen:
            parameters += parameter.numel()
            total_bytes += parameter.nbytes
    return Summary(layers, experts, parameters, quantized, 8 * total_bytes / max(parameters, 1), dict(left))


def report(model: nn.Module, left: Mapping[str, str]) -> Summary:
    """Log how `model` is stored, with a warning if much of it is left out for another reason than a wish to skip it."""
    summary = summarize(model, left)
    unasked = unasked_parameters(model, left)
    share = sum(unasked.values()) / max(summary.parameters, 1)
    if share > _LEFT_OUT:
        largest = sorted(unasked, key=lambda name: -unasked[name])[:3]
        reasons = "; ".join(
            f"{name}: {left.get(name, 'no linear layer, or full in the checkpoint')}" for name in largest
        )
        _logger.warning("%s. %.0f%% of the weights stay unquantised, as in %s", summary, 100 * share, reasons)
    else:
        _logger.info("%s", summary)
    return summary


def unasked_parameters(model: nn.Module, left: Mapping[str, str]) -> dict[str, int]:
    """Return the sizes of the matrices that are not quantised, not skipped on request, and no embeddings."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    codes = {id(p) for m in model.modules() if isinstance(m, QuantizedModule) for p in m.parameters()}
    return {
        name: p.numel()
        for name, p in model.named_parameters()
        if p.ndim >= 2 and id(p) not in tables | codes and not left.get(name, "").startswith("skip_modules")
    }
