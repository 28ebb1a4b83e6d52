"""What has to happen in another library when a configuration is made or a model quantised here."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

# A module that is imported -> the function, as "module:name", that makes its library work with hqq. Both are names:
# nothing is imported here that the caller does not use already.
_BEFORE_CONFIG = {"transformers.utils.quantization_config": "hqq.integrations.transformers:on_config"}
_AFTER_QUANTIZING = {"transformers.modeling_utils": "hqq.integrations.transformers:on_quantized"}


def before_config() -> None:
    """Call what is registered for the libraries that are in use; `BaseQuantizeConfig` does so each time.

    transformers calls `BaseQuantizeConfig` whenever it is about to quantise or to load a quantised model, in whatever
    order the libraries were imported.
    """
    _call(_BEFORE_CONFIG)


def after_quantizing(model: Any) -> None:
    """Let the libraries that are in use know that this library has quantised `model`, or loaded it quantised."""
    _call(_AFTER_QUANTIZING, model)


def _call(targets: dict[str, str], *args: Any) -> None:
    for trigger, target in targets.items():
        if trigger in sys.modules:
            module, _, name = target.partition(":")
            getattr(import_module(module), name)(*args)
