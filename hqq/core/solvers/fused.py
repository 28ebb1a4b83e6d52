"""Solvers that solve and pack in one go on a kind of device, in place of the torch reference where they can."""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from hqq.core.qtensor import QSpec, QTensor
from hqq.core.solvers.min_max import refuse_infinite
from hqq.core.verdicts import expect

_logger = logging.getLogger(__name__)

# Device type -> module with the functions of `FusedSolvers`, imported when first asked for.
_MODULES: dict[str, str] = {"cuda": "hqq.kernels.solve"}


class FusedSolvers(Protocol):
    """What such a module has."""

    def unsupported_reason(self, W: Tensor, spec: QSpec, solver: str) -> str | None:
        """Return None if `solve_and_pack` takes this weight, else a sentence that says why not."""
        ...

    def solve_and_pack(
        self, W: Tensor, spec: QSpec, solver: str, *, storage_dtype: torch.dtype, round_zero: bool
    ) -> tuple[QTensor, Tensor]:
        """Return the quantised weight and flags, all of them nonzero if the weight is finite; no host waits."""
        ...


def solve_fused(
    W: Tensor, spec: QSpec, solver: str, *, storage_dtype: torch.dtype, round_zero: bool
) -> QTensor | None:
    """Return `W` (of spec.shape) quantised by a kernel, or None where there is none.

    Raises WeightError for a weight that is not finite; inside `collected` only when the verdicts are asked for.
    """
    name = _MODULES.get(W.device.type)
    if name is None:
        return None
    fused: FusedSolvers = import_module(name)
    reason = fused.unsupported_reason(W, spec, solver)
    if reason is not None:
        _tell(W.device.type, solver, reason)
        return None
    q, finite = fused.solve_and_pack(W, spec, solver, storage_dtype=storage_dtype, round_zero=round_zero)
    # The only wait for the device, when everything is under way.
    expect(finite.all(), refuse_infinite)
    return q


@cache
def _tell(device: str, solver: str, reason: str) -> None:
    # Once for each reason, not once for each layer.
    _logger.warning("solver %r runs without its %s kernel: %s", solver, device, reason)
