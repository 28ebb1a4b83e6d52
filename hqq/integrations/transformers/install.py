"""Installing the repair into transformers' HqqHfQuantizer, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from hqq.core.linear import HQQLinear
from hqq.errors import BackendError
from hqq.integrations.transformers.versions import MARK, Support, support


def on_config() -> None:
    """Install the repair if transformers can be repaired; called for every configuration, so it returns fast."""
    try:
        from transformers.quantizers import quantizer_hqq
    except ImportError:
        return  # a transformers without HQQ: nothing there can ask for it
    if not hasattr(quantizer_hqq.HqqHfQuantizer, MARK):
        install()


def install() -> Support:
    """Make the installed transformers quantise, save and load with HQQ, and return what that took.

    Does nothing where transformers does so itself, or where it has been done. A transformers that is too old or too
    new is told to raise BackendError, with a sentence that names what to do, where it would use HQQ.
    """
    found = support()
    if found.need == "unsupported" and "HqqHfQuantizer" in str(found.reason):
        return found
    from transformers.quantizers.quantizer_hqq import HqqHfQuantizer

    if hasattr(HqqHfQuantizer, MARK):
        return found
    for name, method in _methods(found).items():
        setattr(HqqHfQuantizer, name, method)
    setattr(HqqHfQuantizer, MARK, found)
    # Also over the property that some versions put there themselves.
    setattr(HQQLinear, "weight", property(_nothing_to_initialize))  # noqa: B010
    return found


def _nothing_to_initialize(self: HQQLinear) -> torch.Tensor:
    """An empty tensor, marked as transformers marks what it need not initialise: some models do that by name."""
    weight = torch.empty(0, dtype=self.compute_dtype, device=self.device)
    weight._is_hf_initialized = True  # type: ignore[attr-defined]
    return weight


def _methods(found: Support) -> Mapping[str, Callable[..., Any]]:
    if found.need == "loader":
        from hqq.integrations.transformers.quantizer import METHODS

        return METHODS
    if found.need == "dtype":
        from hqq.integrations.transformers.quantizer_457 import METHODS as METHODS_457

        return METHODS_457
    if found.need == "unsupported":

        def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
            raise BackendError(str(found.reason))

        return {"validate_environment": refuse, "_process_model_before_weight_loading": refuse}
    return {}
