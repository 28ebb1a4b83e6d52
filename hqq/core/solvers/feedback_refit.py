"""Scale and zero once more, for the codes that error feedback has chosen.

Feedback looks ahead: a column's lattice is found before the errors of later columns are known. With all codes fixed
the error of the outputs is a quadratic function of each group's scale and zero, whose minimum is a formula.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hqq.core.qtensor import QSpec
from hqq.core.solvers.als_storage import stored
from hqq.core.solvers.base import Solution

SWEEPS = 2
# Further away the codes would not be those of the lattice any more.
_MOST = 4.0


def refit(W: Tensor, H: Tensor, found: Solution, spec: QSpec, storage_dtype: torch.dtype) -> Solution:
    """Return `found` with scales and zeros of less output error, for groups within rows (axis 1).

    W: float32 [N, K], the weight to approximate. H: float32 [K, K], second moments of its inputs. One group of
    columns after the other, with the rest as it is; a row's group keeps its lattice unless the error as stored falls.
    """
    N, K = spec.shape
    length = spec.grouping.length
    codes = found.codes.view(N, K // length, length)
    scale, zero = (stat.view(N, K // length).clone() for stat in (found.scale, found.zero))
    residual = W - ((codes - zero.unsqueeze(2)) * scale.unsqueeze(2)).view(N, K)
    for _ in range(SWEEPS):
        for g in range(K // length):
            part = slice(g * length, (g + 1) * length)
            lattice, change = _best(
                codes[:, g], scale[:, g], zero[:, g], residual @ H[:, part], H[part, part], storage_dtype
            )
            scale[:, g], zero[:, g] = lattice
            residual[:, part] += change
    shape = spec.grouping.stat_shape
    return Solution(found.codes, scale.view(shape), zero.view(shape))


def _best(
    q: Tensor, scale: Tensor, zero: Tensor, pull: Tensor, H: Tensor, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return scale and zero [N] of one group, and what the residual [N, gs] gains by them.

    q: codes [N, gs]. pull: residual · H for these columns, half the slope of the error. H: [gs, gs].
    """
    weighted, total = q @ H, H.sum(1)
    along, across, alone = (weighted * q).sum(1), weighted.sum(1), total.sum()
    pull_q, pull_1 = (pull * q).sum(1), pull.sum(1)
    # Scale s and offset c = -s * zero: two equations in their changes; then c again for s as it is stored.
    determinant = along * alone - across.square()
    new_scale = scale + (alone * pull_q - across * pull_1) / determinant
    usable = (new_scale < _MOST * scale) & (new_scale > scale / _MOST)
    new_scale = stored(torch.where(usable, new_scale, scale), dtype)
    offset = -scale * zero + (pull_1 - (new_scale - scale) * across) / alone
    new_zero = stored(-offset / new_scale, dtype)
    change = (q - zero.unsqueeze(1)) * scale.unsqueeze(1) - (q - new_zero.unsqueeze(1)) * new_scale.unsqueeze(
        1
    )
    gain = 2 * (pull * change).sum(1) + ((change @ H) * change).sum(1)
    # A comparison with NaN is False, so what has no lattice keeps the one it had.
    taken = (gain < 0) & usable & torch.isfinite(new_zero)
    lattice = torch.where(taken, new_scale, scale), torch.where(taken, new_zero, zero)
    return lattice, torch.where(taken.unsqueeze(1), change, torch.zeros_like(change))
