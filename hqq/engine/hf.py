"""HQQModelForCausalLM: a transformers causal LM that quantises and saves itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from hqq.engine.base import HQQWrapper
from hqq.models.hf.base import AutoHQQHFModel

if TYPE_CHECKING:
    from transformers import AutoTokenizer as AutoTokenizer

__all__ = ["AutoTokenizer", "HQQModelForCausalLM"]


class HQQModelForCausalLM(HQQWrapper):
    """`from_pretrained`, then `model.quantize_model(quant_config=...)` and `model.save_quantized(save_dir)`."""

    base_class = AutoHQQHFModel

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> nn.Module:
        """Return the unquantised model on the CPU; takes what AutoModelForCausalLM.from_pretrained takes.

        load_in_4bit, load_in_8bit and device_map are ignored: quantising and placing are this library's part here.
        """
        from transformers import AutoModelForCausalLM

        for name in ("load_in_4bit", "load_in_8bit", "device_map"):
            kwargs.pop(name, None)
        model: nn.Module = AutoModelForCausalLM.from_pretrained(*args, **kwargs)
        return cls.wrap(model)


def __getattr__(name: str) -> Any:
    if name == "AutoTokenizer":
        from transformers import AutoTokenizer

        return AutoTokenizer
    raise AttributeError(f"module 'hqq.engine.hf' has no attribute {name!r}")
