"""Models of the Llama-3-8B shapes with random weights, made on the GPU in the form that they are run in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.dequant.tensors import random_qtensor
from hqq.core.linear import HQQLinear

LLAMA_3_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_ROPE_THETA = 500000.0
# Standard deviation of the weights of a trained model of this size.
_SPREAD = 0.02


@dataclass(frozen=True)
class Weights:
    """How a model's weights are kept: bits None is `dtype` itself; `head_bits` is for lm_head alone."""

    bits: int | None
    axis: int = 1
    group_size: int = 64
    head_bits: int | None = None
    dtype: torch.dtype = torch.bfloat16

    def columns(self) -> dict[str, object]:
        """Return the settings under the names of the published table."""
        return {
            "nbits": self.bits or 16,
            "axis": self.axis if self.bits else "",
            "group_size": self.group_size if self.bits else "",
            "lm_head": self.head_bits or 16,
        }


def random_llama(weights: Weights, device: str = "cuda", **changes: Any) -> Any:
    """Return a causal language model in eval mode, whose linear layers are quantised as `weights` says."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**LLAMA_3_8B, **changes})
    parameters = getattr(config, "rope_parameters", None)
    if isinstance(parameters, dict):
        parameters["rope_theta"] = _ROPE_THETA
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(weights.dtype)
    for name, module in list(model.named_modules()):
        bits = weights.head_bits if name == "lm_head" else weights.bits
        if isinstance(module, nn.Linear) and bits is not None:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _random_layer(module, bits, weights, device))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                filled = torch.empty(parameter.shape, dtype=weights.dtype, device=device)
                filled = filled.fill_(1) if filled.ndim == 1 else filled.normal_(std=_SPREAD)
                setattr(module, name, nn.Parameter(filled, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    return model.eval()


def _random_layer(linear: nn.Linear, bits: int, weights: Weights, device: str) -> HQQLinear:
    shape = (linear.out_features, linear.in_features)
    q = random_qtensor(bits, shape, weights.group_size, weights.axis, weights.dtype, device=device)
    top = 2**bits - 1
    q.zero = torch.full_like(q.zero, top / 2)  # type: ignore[arg-type]
    q.scale = torch.full_like(q.scale, _SPREAD * 12**0.5 / (top + 1))  # type: ignore[arg-type]
    layer = HQQLinear(None, None, compute_dtype=weights.dtype, device=device)
    layer._set_qtensor(q)
    layer._features_from_shape()
    return layer
