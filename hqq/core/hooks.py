"""What has to happen in another library before a configuration is used there."""

from __future__ import annotations

import sys
from importlib import import_module

# A module that is imported -> the function, as "module:name", that makes its library work with hqq. Both are names:
# nothing is imported here that the caller does not use already.
_BEFORE_CONFIG = {"transformers.utils.quantization_config": "hqq.integrations.transformers:on_config"}


def before_config() -> None:
    """Call what is registered for the libraries that are in use; `BaseQuantizeConfig` does so each time.

    transformers calls `BaseQuantizeConfig` whenever it is about to quantise or to load a quantised model, in whatever
    order the libraries were imported.
    """
    for trigger, target in _BEFORE_CONFIG.items():
        if trigger in sys.modules:
            module, _, name = target.partition(":")
            getattr(import_module(module), name)()
