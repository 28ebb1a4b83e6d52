"""The half-quadratic solver of the original HQQ, with its trajectory: the zero moves, the scale stays.

Each iteration rounds to the lattice, shrinks the residual towards sparsity (the proximal step of an l_p norm, p < 1)
and sets each group's zero to the mean that fits what is left:

    W_q  = clamp(round(W / scale + zero), 0, max_code)
    W_r  = (W_q - zero) * scale
    W_e  = shrink(W - W_r),  shrink(x) = sign(x) * max(|x| - |x|^(p-1) / beta, 0)
    zero = mean(W_q - (W - W_e) / scale)

and stops when the mean of |W - W_r| over the whole tensor does not fall any more. Source: Badri and Shaji,
"Half-Quadratic Quantization of Large Machine Learning Models", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hqq.core.solvers.base import Solution
from hqq.core.solvers.min_max import Lattice, min_max_lattice, nearest_codes

LP_NORM = 0.7
BETA = 10.0
ITERATIONS = 20

# shrink(x) is exactly zero where |x|^(2-p) <= 1/beta, that is below 0.17013 for the constants above. Residuals of
# trained weights are far smaller, so the powers are almost never needed. The factor leaves room for rounding.
_MARGIN = 0.999

# Blocks of groups this large (in elements) stay in a core's cache through all steps of an iteration.
_BLOCK_ELEMENTS = 1 << 17


def solve_half_quadratic(
    W: Tensor,
    dim: int | None,
    max_code: int,
    *,
    round_zero: bool = False,
    storage_dtype: torch.dtype = torch.float32,
) -> Solution:
    """Solve all groups of `W` (a `GroupSolver`); round_zero rounds the start only, as the original does."""
    lattice = min_max_lattice(W, dim, max_code, round_zero=round_zero, storage_dtype=storage_dtype)
    if dim is not None:
        lattice = lattice._replace(zero=refine_zero(W, lattice, dim, max_code))
    return Solution(nearest_codes(W, lattice, max_code), lattice.scale, lattice.zero)


def refine_zero(
    W: Tensor,
    start: Lattice,
    dim: int,
    max_code: int,
    *,
    lp_norm: float = LP_NORM,
    beta: float = BETA,
    iterations: int = ITERATIONS,
) -> Tensor:
    """Return the zeros that the half-quadratic iteration ends on, from the lattice `start`.

    W: float32 [R, C]; groups extend along `dim`. The zeros are those of the iteration that failed to improve the
    error, as in the original.
    """
    zero = start.zero
    best = torch.inf
    blocks = list(_blocks(W, dim))
    scratch = W.new_empty(4, max(W[block].numel() for block in blocks))
    for _ in range(iterations):
        updated = torch.empty_like(zero)
        total = 0.0
        for block in blocks:
            W_block = W[block]
            updated[block], error = _step(
                W_block, start.inverse_scale[block], zero[block], dim, max_code, lp_norm, beta, scratch
            )
            total += error * W_block.numel()
        zero = updated
        # The original compares float32 means: anything finer would go on where it stops.
        mean = torch.tensor(total / W.numel(), dtype=torch.float32).item()
        if not mean < best:
            break
        best = mean
    return zero


def _blocks(W: Tensor, dim: int) -> Iterator[tuple[slice, slice]]:
    """Yield index pairs that cut W and its per-group tensors into blocks of whole groups."""
    everything = slice(None)
    if W.device.type != "cpu":
        yield everything, everything
        return
    groups, length = W.shape[1 - dim], W.shape[dim]
    width = max(64, _BLOCK_ELEMENTS // length)
    for begin in range(0, groups, width):
        block = slice(begin, begin + width)
        yield (block, everything) if dim == 1 else (everything, block)


def _step(
    W: Tensor,
    inverse_scale: Tensor,
    zero: Tensor,
    dim: int,
    max_code: int,
    lp_norm: float,
    beta: float,
    scratch: Tensor,
) -> tuple[Tensor, float]:
    """Run one iteration on a block; return its new zeros and the mean of |W - W_r|.

    scratch: four rows of at least W's elements. Fresh tensors of this size would each be pages that the system maps
    and clears anew, which takes longer than the arithmetic.
    """
    scaled, codes, residual, magnitude = (row[: W.numel()].view(W.shape) for row in scratch)
    torch.mul(W, inverse_scale, out=scaled)
    torch.add(scaled, zero, out=codes).round_().clamp_(0, max_code)
    torch.sub(codes, zero, out=residual).div_(inverse_scale)
    torch.sub(W, residual, out=residual)
    torch.abs(residual, out=magnitude)
    error = float(magnitude.mean())
    if lp_norm >= 2 or bool(magnitude.max() > _MARGIN * beta ** (-1.0 / (2.0 - lp_norm))):
        power = torch.pow(magnitude, lp_norm - 1, out=scaled).mul_(1.0 / beta)
        kept = magnitude.sub_(power).clamp_min_(0.0).mul_(residual.sign_())
        torch.sub(W, kept, out=scaled).mul_(inverse_scale)
    return codes.sub_(scaled).mean(dim, keepdim=True), error
