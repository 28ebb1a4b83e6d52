"""Which device a call means."""

from __future__ import annotations

import warnings
from typing import TypeAlias

import torch

from hqq.errors import ConfigError, DeviceFallbackWarning

DeviceLike: TypeAlias = str | int | torch.device | None


def resolve_device(device: DeviceLike, default: torch.device | None = None) -> torch.device:
    """Return the torch.device that `device` (str, index, torch.device or None) stands for on this machine.

    None means `default`, or, without one, CUDA where it is present and the CPU elsewhere. A CUDA device on a
    machine without CUDA becomes the CPU with a DeviceFallbackWarning, so that scripts written for a GPU run.
    Raises ConfigError for a name that no device has.
    """
    if device is None:
        if default is not None:
            return default
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"got device={device!r}; expected one such as cpu, cuda or cuda:1 ({error})"
        ) from None
    if resolved.type == "cuda" and not torch.cuda.is_available():
        warnings.warn(
            f"got device={str(resolved)!r}, but this machine has no usable CUDA device; using the CPU",
            DeviceFallbackWarning,
            stacklevel=3,
        )
        return torch.device("cpu")
    return resolved
