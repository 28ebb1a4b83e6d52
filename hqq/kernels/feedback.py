"""Rounding columns with error feedback on the GPU: one launch for up to 64 columns of all rows."""

from __future__ import annotations

import torch
from torch import Tensor

from hqq.kernels.availability import device_reason, unavailable_reason

_LONGEST = 64
_ROWS = 32


def takes(columns: Tensor) -> bool:
    """Whether the kernel runs here on `columns`, float32 [c, N]."""
    usable = unavailable_reason() is None and device_reason(columns.device) is None
    return usable and len(columns) <= _LONGEST and columns.dtype == torch.float32


def round_columns(
    columns: Tensor, U: Tensor, scale: Tensor, zero: Tensor, max_code: int, codes: Tensor, errors: Tensor
) -> None:
    """Do what `hqq.core.solvers.feedback_round.round_columns` says, but leave `columns` as it is."""
    import triton

    from hqq.kernels.feedback_kernel import feedback_kernel  # loads triton

    count, N = columns.shape
    U, scale, zero = U.contiguous(), scale.contiguous(), zero.contiguous()
    feedback_kernel[(triton.cdiv(N, _ROWS),)](
        columns,
        U,
        scale,
        zero,
        codes,
        errors,
        count,
        N,
        N if len(scale) > 1 else 0,
        N if len(zero) > 1 else 0,
        MAX_CODE=max_code,
        C=max(triton.next_power_of_2(count), 2),
        ROWS=_ROWS,
        num_warps=1,
    )
