"""Whether Triton kernels run here, and if not, why: without importing triton until it is known to be there."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors (TRITON_INTERPRET=1, for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1" and triton_missing_reason() is None


@cache
def triton_missing_reason() -> str | None:
    """Return None if triton can be imported, else a sentence."""
    if find_spec("triton") is None:
        return "triton is not installed (it comes with torch's CUDA builds on Linux; elsewhere: pip install triton)"
    return None


def unavailable_reason() -> str | None:
    """Return None if the kernels run on this machine, else a sentence that says why not."""
    missing = triton_missing_reason()
    if missing is not None:
        return missing
    if not torch.cuda.is_available() and not interpreting():
        return "torch sees no CUDA device on this machine"
    return None


def device_reason(device: torch.device) -> str | None:
    """Return None if the kernels take tensors on `device`, else a sentence that says why not."""
    if device.type == "cuda" or (device.type == "cpu" and interpreting()):
        return None
    return f"the weight is on {device}, and the Triton kernels take CUDA tensors"
