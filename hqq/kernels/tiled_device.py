"""What the kernels on tiles ask of a device and of a dtype."""

from __future__ import annotations

from functools import cache

import torch

# A dtype as the kernels' sources call it.
ELEMENTS = {torch.float16: "F16", torch.bfloat16: "BF16"}


@cache
def multiprocessors(device: int) -> int:
    """Return how many multiprocessors CUDA device `device` has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
