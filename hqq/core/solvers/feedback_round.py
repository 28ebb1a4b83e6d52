"""Rounding neighbouring columns one after the other, each making up for the errors of those before."""

from __future__ import annotations

from importlib import import_module

from torch import Tensor

# Device type -> module with a `round_columns` that does the same in one launch, and a `takes` that says when.
_MODULES: dict[str, str] = {"cuda": "hqq.kernels.feedback"}


def round_columns(
    columns: Tensor, U: Tensor, scale: Tensor, zero: Tensor, max_code: int, codes: Tensor, errors: Tensor
) -> None:
    """Write the codes of `columns` and what their rounding costs later columns; `columns` itself is used up.

    Args:
        columns: float32 [c, N], each column of the weight a row.
        U: float32 [c, c], the part of the factor for these columns.
        scale, zero: float32 [c, N], or [1, N] for all of them.
        codes, errors: float32 [c, N], written. Errors are those of the values, over U's diagonal.
    """
    name = _MODULES.get(columns.device.type)
    fused = import_module(name) if name is not None else None
    if fused is not None and fused.takes(columns):
        fused.round_columns(columns, U, scale, zero, max_code, codes, errors)
        return
    inverse = scale.reciprocal()
    # On the host: the numbers are used as Python scalars.
    reciprocals = U.diagonal().reciprocal().tolist()
    for k, (column, code, error) in enumerate(
        zip(columns.unbind(0), codes.unbind(0), errors.unbind(0), strict=True)
    ):
        row = k if len(scale) > 1 else 0
        code.copy_(column).mul_(inverse[row]).add_(zero[row]).round_().clamp_(0, max_code)
        error.copy_(code).sub_(zero[row]).mul_(scale[row]).sub_(column).mul_(-reciprocals[k])
        columns[k + 1 :].addr_(U[k, k + 1 :], error, alpha=-1)
