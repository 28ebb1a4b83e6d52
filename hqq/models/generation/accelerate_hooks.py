"""Hooks that accelerate puts around the modules of a dispatched model, in a form that compiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from hqq.errors import BackendError


def make_hooks_compilable(model: nn.Module) -> None:
    """Replace what moves inputs to the device of a module, which torch.compile refuses to enter, by plain code.

    accelerate's own way to remove its hooks still works. Does nothing to a model without hooks. Raises BackendError if
    there are weights that a hook fetches from elsewhere.
    """
    hooked = [module for module in model.modules() if hasattr(module, "_hf_hook")]
    for module in hooked:
        if any(getattr(hook, "offload", False) for hook in _hooks(module)):
            raise BackendError(
                "got a model with offloaded weights, which no graph can fetch; use compile=None, or a device_map "
                "without cpu and disk"
            )
    for module in hooked:
        device = next((d for d in map(_device, _hooks(module)) if d is not None), None)
        module.forward = _moving(module._old_forward, device)  # type: ignore[arg-type]


def _hooks(module: Any) -> tuple[Any, ...]:
    hook = module._hf_hook
    return tuple(getattr(hook, "hooks", (hook,)))


def _device(hook: Any) -> torch.device | None:
    device = getattr(hook, "execution_device", None)
    if isinstance(device, int):
        return torch.device("cuda", device)
    return None if device is None else torch.device(device)


def _moving(forward: Callable[..., Any], device: torch.device | None) -> Callable[..., Any]:
    if device is None:
        return forward

    @wraps(forward)
    def moving(*args: Any, **kwargs: Any) -> Any:
        return forward(*_to(args, device), **_to(kwargs, device))

    return moving


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_to(part, device) for part in value)
    if type(value) is dict:
        return {key: _to(part, device) for key, part in value.items()}
    return value  # the cache keeps each layer's tensors where the layer is
