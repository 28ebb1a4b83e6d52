"""What is known while one model is being loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hqq.core.quantized_module import QuantizedModule
from hqq.errors import ConfigError, HQQError, MissingKeysError
from hqq.integrations.transformers.keys import splits
from hqq.integrations.transformers.layers import can_hold_codes
from hqq.integrations.transformers.plan import Plan, plan

_ATTRIBUTE = "_hqq_session"


class Session:
    """One call of `from_pretrained`: the plan, what went wrong, and which names the model's parameters have.

    It lives on transformers' quantiser object from before the weights are loaded until after.
    """

    def __init__(self, hf_quantizer: Any, model: nn.Module) -> None:
        self.hf_quantizer = hf_quantizer
        self.model = model
        config = hf_quantizer.quantization_config
        self.plan: Plan = plan(model, _quant_config(config), config.skip_modules)
        self.failed: dict[str, HQQError] = {}
        self._prefix = getattr(model, "base_model_prefix", "") or ""
        self._parameters = {name for name, _ in model.named_parameters()}

    @staticmethod
    def of(hf_quantizer: Any) -> Session | None:
        """Return the session of `hf_quantizer`, or None outside of loading."""
        session: Session | None = vars(hf_quantizer).get(_ATTRIBUTE)
        return session

    def start(self) -> None:
        """Attach the session to the quantiser."""
        setattr(self.hf_quantizer, _ATTRIBUTE, self)

    def end(self) -> None:
        """Detach the session, and with it what it refers to."""
        delattr(self.hf_quantizer, _ATTRIBUTE)

    def parameter_of(self, stem: str) -> str | None:
        """Return the parameter that a quantised layer called `stem` in a checkpoint stands for, or None.

        A checkpoint of the base model names layers without the prefix that a model with a head gives them, and the
        other way round; the result keeps the checkpoint's form.
        """
        for name in (f"{stem}.weight", stem):
            if self.in_model(name) is not None:
                return name
        return None

    def split(self, key: str) -> tuple[str, str] | None:
        """Return the parameter and the state key that the checkpoint's `key` is made of, or None for any other name."""
        for stem, end in splits(key):
            name = self.parameter_of(stem)
            if name is not None:
                return name, end
        return None

    def in_model(self, name: str) -> str | None:
        """Return what the model calls the parameter that a checkpoint calls `name`, or None."""
        variants = [name]
        if self._prefix:
            variants += [f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")]
        for variant in variants:
            if variant in self._parameters and can_hold_codes(self.model, variant):
                return variant
        return None

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype in which the model wants the parameter called `name`."""
        owner = self.model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, QuantizedModule):
            return owner.compute_dtype
        parameter = self.model.get_parameter(name)
        patterns = (
            rf"(^|\.){part.replace('*', '.*')}($|\.)" for part in _in_float32(self.model, parameter.dtype)
        )
        return torch.float32 if any(re.search(pattern, name) for pattern in patterns) else parameter.dtype

    def is_loaded(self, name: str) -> bool:
        """Whether the parameter called `name` came from the checkpoint, as it is or as codes."""
        path, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(path)
        if leaf == "weight" and isinstance(owner, QuantizedModule):
            return True
        # transformers marks every parameter that came from the checkpoint.
        return isinstance(owner._modules.get(leaf), QuantizedModule) or bool(
            getattr(owner._parameters.get(leaf), "_is_hf_initialized", False)
        )

    def refuse_absent(self, names: Iterable[str]) -> None:
        """Raise MissingKeysError if there are `names` that a quantised checkpoint has to have."""
        absent = [name for name in names if self.must_be_there(name)]
        if absent:
            more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
            raise MissingKeysError(
                f"got a quantised checkpoint without {', '.join(absent[:3])}{more}; expected the codes, or the full "
                "weight, of every layer that its configuration covers. Was it copied completely?"
            )

    def must_be_there(self, name: str) -> bool:
        """Whether a quantised checkpoint has to hold the parameter `name`.

        Not so for the head of a model of another kind than the one that was saved: it is new, and its owner trains it.
        """
        architectures = getattr(self.model.config, "architectures", None) or ()
        is_head = bool(self._prefix) and not name.startswith(f"{self._prefix}.")
        has_base = hasattr(self.model, self._prefix) if self._prefix else False
        return not (is_head and has_base and type(self.model).__name__ not in architectures)


def _in_float32(model: Any, dtype: torch.dtype) -> list[str]:
    """Return the names (or globs) of modules that a model of `dtype` keeps in float32."""
    if hasattr(model, "_get_dtype_plan"):
        plan: Mapping[str, torch.dtype] = model._get_dtype_plan(dtype)
    elif hasattr(model, "dtype_plan"):
        plan = model.dtype_plan
    else:
        strict, lenient = model._keep_in_fp32_modules_strict or (), model._keep_in_fp32_modules or ()
        return [*strict, *(lenient if dtype == torch.float16 else ())]
    return [name for name, kept in plan.items() if kept == torch.float32]


def _quant_config(config: Any) -> Mapping[str, Any]:
    if not isinstance(config.quant_config, Mapping) or not config.quant_config:
        raise ConfigError(
            f"got quant_config={config.quant_config!r}; expected what HqqConfig(nbits=..., group_size=...) holds"
        )
    return config.quant_config
