"""The dtypes that checkpoints may name, as a fixed table: nothing read from a file is ever evaluated."""

from __future__ import annotations

import torch

from hqq.errors import DtypeError

COMPUTE_DTYPES: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_BY_NAME: dict[str, torch.dtype] = {
    str(dtype): dtype
    for dtype in (*COMPUTE_DTYPES, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
}


def dtype_from_name(name: str) -> torch.dtype:
    """Return the torch dtype called `name`, with or without the "torch." in front.

    Raises DtypeError for a name that is not in the table.
    """
    key = name if name.startswith("torch.") else f"torch.{name}"
    try:
        return _BY_NAME[key]
    except KeyError:
        known = ", ".join(sorted(_BY_NAME))
        raise DtypeError(f"got dtype name {name!r}; expected one of {known}") from None


def check_compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return `dtype` if layers can compute in it, else raise DtypeError."""
    if dtype not in COMPUTE_DTYPES:
        known = ", ".join(str(d) for d in COMPUTE_DTYPES)
        raise DtypeError(f"got compute_dtype={dtype}; expected one of {known}")
    return dtype
