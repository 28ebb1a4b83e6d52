"""Errors of lattices, how well float32 knows them, and whether one set of groups is as good as another."""

from __future__ import annotations

import torch
from torch import Tensor

from hqq.core.solvers import Solution


def errors(
    W: Tensor,
    found: Solution,
    dtype: torch.dtype = torch.float32,
    weights: Tensor | None = None,
    dim: int = 1,
) -> Tensor:
    """Squared error of each group (along `dim`) in float64, with scale and zero as `dtype` holds them."""
    squares = (_fitted(found, dtype) - W.double()).square()
    return (squares if weights is None else squares * weights.double()).sum(dim)


def doubt(
    W: Tensor,
    found: Solution,
    dtype: torch.dtype = torch.float32,
    weights: Tensor | None = None,
    dim: int = 1,
) -> Tensor:
    """How far a solver's float32 may be from the squared error of each group on a lattice that it judges.

    A residual has a difference, a product, another difference, a scaling and its scale rounded: 2 u of the lattice's
    value and 3 u of itself; its square and weight another 3 u, and a sum of n squares n u.
    """
    u = torch.finfo(torch.float32).eps / 2
    fitted = _fitted(found, dtype)
    residual = (fitted - W.double()).abs()
    terms = 4 * residual * fitted.abs() + (9 + W.shape[dim]) * residual.square()
    return u * (terms if weights is None else terms * weights.double()).sum(dim)


def as_good(mine: Tensor, theirs: Tensor) -> bool:
    """Whether errors of groups are no larger in sum than those of the same search with other roundings.

    Where the two ended in different lattices, which of them is better is chance: signs that fall at random add up to
    six roots of the sum of squares in one case of 10^8 (Hoeffding 1963).
    """
    difference = mine - theirs
    return bool(difference.sum() <= 1e-4 * theirs.sum() + 6 * difference.square().sum().sqrt())


def _fitted(found: Solution, dtype: torch.dtype) -> Tensor:
    scale, zero = (stat.to(dtype).double() for stat in (found.scale, found.zero))
    return (found.codes.double() - zero) * scale
