"""Solving and packing on the GPU: a weight in, packed codes with scale and zero out, in a few launches."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hqq.core.qtensor import QSpec, QTensor
from hqq.errors import ConfigError, WeightError
from hqq.kernels.availability import device_reason, unavailable_reason
from hqq.kernels.solve_config import SolveConfig, blocks_for, longest_group, shipped

SOLVERS = ("als", "hqq", "minmax")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST_TRITON = (3, 3)  # the first with tuples in kernels


def unsupported_reason(W: Tensor, spec: QSpec, solver: str) -> str | None:
    """Return None if the kernels solve `W` as `spec` says with the solver called `solver`, else a sentence why not."""
    reason = unavailable_reason() or _version_reason() or device_reason(W.device)
    if reason is not None:
        return reason
    if solver not in SOLVERS:
        return f"the solver {solver!r} has no kernel"
    if W.dtype not in DTYPES:
        return f"the kernels take float32, bfloat16 and float16 weights, not {W.dtype}"
    if not spec.channel_wise or spec.format is None:
        return "the kernels take groups, and pack their codes"
    longest = longest_group()
    if spec.grouping.length > longest:
        return (
            f"groups of {spec.grouping.length} weights do not fit a program's registers, which hold {longest}"
        )
    return None


@cache
def _version_reason() -> str | None:
    import triton

    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found < _OLDEST_TRITON:
        return f"triton {triton.__version__} has no tuples in kernels; 3.3 is the first that does"
    return None


def solve_and_pack(
    W: Tensor,
    spec: QSpec,
    solver: str,
    *,
    storage_dtype: torch.dtype = torch.float32,
    round_zero: bool = False,
    config: SolveConfig | None = None,
) -> tuple[QTensor, Tensor]:
    """Solve all groups of `W` and pack their codes, on W's device and its current stream, without synchronising.

    "minmax" gives what its torch reference gives. Codes of the others are the reference's up to rounding: the order of
    sums differs, and ties that it turns over.

    Args:
        W: float32, bfloat16 or float16 of spec.shape; not contiguous ones are copied first.
        spec: bits, grouping and pack format.
        solver: "als", "hqq" or "minmax".
        storage_dtype: dtype that scale and zero will be stored in.
        round_zero: "hqq" starts from integer zeros, and "minmax" has them.
        config: block sizes, for those who measured.

    Returns packed codes with float32 scale and zero, and a tensor of flags on the device: a zero among them means that
    W is not finite and the rest is worth nothing (`check_finite` asks). Raises ConfigError for what is not supported.
    """
    reason = unsupported_reason(W, spec, solver)
    if reason is not None:
        raise ConfigError(f"got a weight that the solver kernels cannot take: {reason}")
    if tuple(W.shape) != spec.shape:
        raise ConfigError(f"got a weight of shape {tuple(W.shape)}; the description says {spec.shape}")
    from hqq.kernels import solve_launch  # loads triton

    W = W.detach().contiguous()
    grouping, fmt = spec.grouping, spec.format
    assert fmt is not None
    config = config or shipped(solver, grouping.axis, grouping.length)
    blocks = blocks_for(grouping.length, grouping.axis, W.element_size(), config)
    if solver == "als":
        found = solve_launch.solve_als(W, spec, storage_dtype, blocks)
    elif solver == "hqq":
        found = solve_launch.solve_half_quadratic(W, spec, storage_dtype, blocks, round_zero=round_zero)
    else:
        found = solve_launch.solve_min_max(W, spec, storage_dtype, blocks, round_zero=round_zero)
    W_q = solve_launch.encode(W, found, spec, fmt)
    scale, zero = (stat.view(grouping.stat_shape) for stat in (found.scale, found.zero))
    return QTensor(W_q, scale, zero, spec), found.finite


def check_finite(flags: Tensor) -> None:
    """Wait for the device and raise WeightError if the weight that `flags` are of was not finite."""
    if not bool(flags.all()):
        raise WeightError("got a weight with NaN or infinite values; expected finite values")
