"""Making a transformers model that this library quantised one that transformers knows to be quantised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hqq.core.quantized_module import QuantizedModule
from hqq.integrations.transformers.casting import allow_casts
from hqq.integrations.transformers.finish import prefer_single_experts
from hqq.integrations.transformers.versions import support


def on_quantized(model: nn.Module) -> None:
    """Set up `model` for `save_pretrained` and for PEFT, if it is a transformers model and has a configuration.

    It gets what `from_pretrained` would have given it: a quantiser that says how to save it, `quantization_method`,
    and no conversion that would take its codes apart.
    """
    from transformers.modeling_utils import PreTrainedModel

    described = getattr(getattr(model, "config", None), "quantization_config", None)
    if not isinstance(model, PreTrainedModel) or not isinstance(described, Mapping):
        return
    from transformers.quantizers.quantizer_hqq import HqqHfQuantizer
    from transformers.utils.quantization_config import HqqConfig, QuantizationMethod

    from hqq.integrations.transformers.install import install

    install()
    config = HqqConfig.from_dict(dict(described))
    adopted: Any = model
    adopted.hf_quantizer = HqqHfQuantizer(config, pre_quantized=True)  # type: ignore[no-untyped-call]
    adopted.is_quantized = True
    adopted.quantization_method = QuantizationMethod.HQQ
    adopted.config._is_quantized = True
    prefer_single_experts(model)
    allow_casts()
    if support().need == "loader":
        from hqq.integrations.transformers.conversions import keep_reversible

        keep_reversible(model)


def state_without_aliases(model: nn.Module) -> dict[str, Any]:
    """Return the state dict of `model` with shared codes under their first name only.

    safetensors refuses tensors that share memory. Loading ties the layers again.
    """
    state: dict[str, Any] = model.state_dict()
    first: dict[object, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, QuantizedModule) or not module.is_initialized():
            continue
        if first.setdefault(module.codes_key(), name) == name:
            continue
        prefix = f"{name}."
        for key in [key for key in state if key.startswith(prefix) and key != f"{prefix}bias"]:
            del state[key]
    return state
