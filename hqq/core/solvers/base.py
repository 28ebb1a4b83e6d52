"""What every solver takes and gives."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Solution(NamedTuple):
    """Codes, scale and zero of a grouped matrix W [R, C]: W is about `(codes - zero) * scale`.

    codes: float32 [R, C], integers in 0 … max_code. scale, zero: float32, W's shape with the group's dimension 1.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


class GroupSolver(Protocol):
    """Finds codes, scale and zero for every group of a matrix."""

    def __call__(
        self,
        W: Tensor,
        dim: int | None,
        max_code: int,
        *,
        round_zero: bool = False,
        storage_dtype: torch.dtype = torch.float32,
    ) -> Solution:
        """Solve all groups of `W`.

        Args:
            W: float32 [R, C], any device; not changed.
            dim: dimension along which a group extends (1: rows are groups, 0: columns are groups); None if the
                whole of W is one group.
            max_code: largest code.
            round_zero: start from (or, where a solver says so, search) integer zeros.
            storage_dtype: dtype that scale and zero will be stored in.

        Raises:
            WeightError: W is not finite.
        """
        ...
