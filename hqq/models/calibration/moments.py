"""Second moments of a layer's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from hqq.errors import WeightError

# With fewer tokens than this share of its inputs a layer gains nothing (docs/solver.md).
_LEAST_SHARE = 0.125
_LEAST_TOKENS = 32


def tokens_needed(K: int) -> int:
    """Return how many tokens a layer of `K` inputs has to see to be calibrated."""
    return max(int(_LEAST_SHARE * K), _LEAST_TOKENS)


class Moments:
    """Sums over the inputs x~ of a layer in the quantised model, and x in the full one.

    H: sum of x~ x~^T, float32 [K, K]. cross: sum of (x - x~) x~^T, or None if there was no x for some x~.
    rows: how many x~ there were.
    """

    def __init__(self, K: int, device: torch.device) -> None:
        self.H = torch.zeros(K, K, device=device)
        self.cross: Tensor | None = None
        self.rows = 0
        self._crossed = 0

    def add(self, x: Tensor, full: Tensor | None) -> None:
        """Add inputs [rows, K] of any float dtype; full: those of the full model for the same tokens, if known."""
        if x.shape[0] == 0:
            return
        values = x.to(self.H)
        self.H.addmm_(values.t(), values)
        self.rows += len(values)
        if full is None or full.shape != x.shape:
            return
        self._crossed += len(values)
        if self.cross is None:
            self.cross = torch.zeros_like(self.H)
        if full is not x:
            self.cross.addmm_((full.to(self.H) - values).t(), values)

    def correction(self) -> Tensor | None:
        """Return `cross` if every input had its counterpart."""
        return self.cross if self._crossed == self.rows else None

    def check_finite(self) -> None:
        """Raise WeightError if the inputs were not finite, or too large to be squared."""
        if not bool(torch.isfinite(self.H.diagonal()).all()):
            raise WeightError(
                "got activations with NaN, infinite or overflowing values; expected finite ones. A dtype of larger "
                "range, float32 or bfloat16, may help, or leave the layer out with skip"
            )
