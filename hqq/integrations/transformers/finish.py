"""After the weights are loaded: nothing may be random, and the model must save what it now is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hqq.core.experts import HQQExperts
from hqq.core.quantized_module import QuantizedModule
from hqq.errors import HQQError
from hqq.integrations.transformers.casting import allow_casts
from hqq.integrations.transformers.session import Session
from hqq.integrations.transformers.summary import report


def finish(session: Session) -> None:
    """Check that every planned weight is there, and set up the model for inference and saving.

    Raises the first error met while loading, or MissingKeysError for a quantised checkpoint that lacks a layer.
    """
    model, hf_quantizer = session.model, session.hf_quantizer
    _raise_failures(session.failed)
    if hf_quantizer.pre_quantized:
        session.refuse_absent(name for name in session.plan.weights if not session.is_loaded(name))
    _settle_biases(session)
    prefer_single_experts(model)
    allow_casts()
    model.is_hqq_quantized = True  # type: ignore[assignment]
    model.is_hqq_serializable = True  # type: ignore[assignment]
    model.hqq_summary = report(model, session.plan.left)  # type: ignore[assignment]


def _raise_failures(failed: dict[str, HQQError]) -> None:
    for name, error in failed.items():
        others = f" ({len(failed) - 1} more layers failed)" if len(failed) > 1 else ""
        raise type(error)(f"{name}: {error}{others}") from error


def _settle_biases(session: Session) -> None:
    for name, module in session.model.named_modules():
        if not isinstance(module, QuantizedModule) or module.bias is None:
            continue
        bias, device = module.bias, module.device
        if not session.is_loaded(f"{name}.bias"):
            if session.hf_quantizer.pre_quantized:
                session.refuse_absent([f"{name}.bias"])
            module.bias = torch.zeros(bias.shape, dtype=module.compute_dtype, device=device)  # type: ignore[assignment]
        elif bias.dtype != module.compute_dtype or bias.device != device:
            module.bias = bias.detach().to(device, module.compute_dtype)  # type: ignore[assignment]
        else:
            bias.requires_grad_(False)


def prefer_single_experts(model: nn.Module) -> None:
    """Make modules with quantised experts use them one by one: any other way dequantises all of them."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        has_experts = any(isinstance(child, HQQExperts) for child in module._modules.values())
        if has_experts and hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
