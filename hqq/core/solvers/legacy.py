"""Solvers in the original's calling convention: the scale is inverted, and the start is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hqq.core.devices import DeviceLike, resolve_device
from hqq.core.solvers.base import Solution
from hqq.core.solvers.half_quadratic import BETA, ITERATIONS, LP_NORM, refine_zero
from hqq.core.solvers.min_max import Lattice, min_max_lattice, nearest_codes


@torch.no_grad()
def optimize_weights_proximal(
    tensor: Tensor,
    scale: Tensor,
    zero: Tensor,
    min_max: Sequence[int],
    axis: int = 0,
    device: DeviceLike = None,
    opt_params: Mapping[str, float] | None = None,
    verbose: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the half-quadratic solver from a given start.

    Args:
        tensor: grouped weights [R, C]; groups extend along `axis`.
        scale: inverse scale of each group, so that codes are `round(tensor * scale + zero)`.
        zero: zero of each group.
        min_max: smallest (0) and largest code.
        device: where to solve; None: the tensor's own.
        opt_params: any of lp_norm, beta, iters.
        verbose: accepted for old callers; the solver prints nothing.

    Returns (codes as float, scale, zero), scale inverted as given.
    """
    params = {"lp_norm": LP_NORM, "beta": BETA, "iters": ITERATIONS, **(opt_params or {})}
    target = resolve_device(device, tensor.device)
    W = tensor.to(target, torch.float32)
    inverse_scale, zero = scale.to(W), zero.to(W)
    start = Lattice(inverse_scale, 1.0 / inverse_scale, zero)
    zero = refine_zero(
        W,
        start,
        axis,
        int(min_max[1]),
        lp_norm=params["lp_norm"],
        beta=params["beta"],
        iterations=int(params["iters"]),
    )
    codes = nearest_codes(W, start._replace(zero=zero), int(min_max[1]))
    return codes.to(tensor.device), inverse_scale.to(tensor.device), zero.to(tensor.device)


def solve_with(
    optimize_weights: Callable[..., tuple[Tensor, Tensor, Tensor]],
    W: Tensor,
    dim: int,
    max_code: int,
    **options: Any,
) -> Solution:
    """Solve all groups of `W` with a function of the original's convention, from the min-max lattice."""
    start = min_max_lattice(W, dim, max_code, **options)
    codes, inverse_scale, zero = optimize_weights(
        tensor=W, scale=start.inverse_scale, zero=start.zero, min_max=[0, max_code], axis=dim, device=W.device
    )
    return Solution(codes, 1.0 / inverse_scale, zero)
