"""What kernels ask of a device and of a dtype."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

# A dtype as the kernels' sources call it.
ELEMENTS = {torch.float16: "F16", torch.bfloat16: "BF16"}


@cache
def multiprocessors(device: int) -> int:
    """Return how many multiprocessors CUDA device `device` has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Return the context to launch a kernel for tensors on `device` in: Triton launches on the current device."""
    # Changing it costs microseconds, so only where it differs.
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()
