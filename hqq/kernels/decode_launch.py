"""What the launchers of the decoding kernels share: device, overlap with the previous kernel, and rounding."""

# The jitted function is written in Triton's language, which is not quite Python.
# mypy: ignore-errors

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from hqq.kernels.availability import interpreting
from hqq.kernels.dequant_flow import GDC_WAIT
from hqq.kernels.device import multiprocessors

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def new_output(like: Tensor, columns: int) -> Tensor:
    """Return what a kernel fills: a row of `columns` for each row of `like`, every element of which is written."""
    return like.new_empty(like.shape[0], columns)


def options(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments that every decoding kernel has: dtype, interpreter, overlap with the kernel before."""
    overlap, interpreted = overlaps(device), interpreting()
    return {
        "DTYPE": DTYPES[dtype],
        "INTERPRETED": interpreted,
        "OVERLAP": overlap,
        **({"launch_pdl": True} if overlap else {}),
        # What Triton has done so far without being told; newer ones warn where they are not.
        **({} if interpreted else {"enable_fp_fusion": True}),
    }


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel on `device` can start before the previous one ends (compute capability 9.0, Triton 3.4)."""
    if device.type != "cuda" or torch.version.cuda is None or GDC_WAIT is None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def processors(device: torch.device) -> int:
    """Return how many multiprocessors `device` has."""
    if device.type != "cuda":
        return 1
    return multiprocessors(device.index)
