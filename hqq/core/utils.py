"""The original's helper functions, under their old path."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor

from hqq.core.dtypes import dtype_from_name
from hqq.core.wire import encode
from hqq.errors import DtypeError

__all__ = ["cleanup", "decode_safetensor_type", "encode_safetensor_type", "is_divisible"]


def cleanup() -> None:
    """Free unreachable objects and the CUDA memory that torch caches."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def is_divisible(val1: int, val2: int) -> bool:
    """Whether `val2` divides `val1`."""
    return val1 % val2 == 0


def encode_safetensor_type(data: Any) -> Tensor | None:
    """Return `data` (tensor, bool, number, str, torch.dtype, torch.Size) as a tensor; None stays None."""
    return None if data is None else encode(data)


def decode_safetensor_type(data: Tensor, data_type: Any) -> Any:
    """Return the value of `data_type` that `encode_safetensor_type` wrote as `data`.

    Raises DtypeError for a type that is never written, or for the name of an unknown dtype.
    """
    if data_type in (torch.Tensor, torch.nn.Parameter):
        return data
    if data_type is torch.Size:
        return torch.Size(data.flatten().tolist())
    if data_type in (bool, int, float):
        return data_type(data.item())
    if data_type in (str, torch.dtype):
        text = bytes(data.to(torch.uint8).flatten().tolist()).decode("ascii")
        return text if data_type is str else dtype_from_name(text)
    raise DtypeError(f"got data_type={data_type!r}; expected Tensor, Size, bool, int, float, str or dtype")
