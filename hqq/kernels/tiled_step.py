"""A product of a decoding step together with what a transformer does in front of it and behind it, in one kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hqq.errors import ShapeError
from hqq.kernels.tile_layout import TILE_ROWS
from hqq.kernels.tiled_gemv import Norm, launch_gemv
from hqq.kernels.tiled_op import aligned, check_operands, route_on, tiled_dequantize
from hqq.kernels.tiled_tune import gemv_config, work_with
from hqq.kernels.tiled_weight import TiledWeight

# With more tokens a kernel for the norm costs less: in a product, every block of the grid normalises all of x. Measured
# on an H200 in steps of 1 to 8 tokens.
NORM_TOKENS = 4


def takes(weight: TiledWeight, x: Tensor, gated: bool = False) -> bool:
    """Whether `step_linear` is one kernel for x [M, K]: few tokens, a GPU with the kernels; a gate as `gate_fits`."""
    fits = x.dtype == weight.dtype and x.device == weight.device and (not gated or gate_fits(weight))
    return fits and x.is_cuda and route_on(work_with(weight, x.shape[0]), x.device) == "gemv"


def gate_fits(weight: TiledWeight) -> bool:
    """Whether the first half of the outputs has row tiles of its own, as many as the second, with axis=1."""
    N = weight.spec.shape[0]
    joined = len(weight.parts) == 2 and len({part.shape for part in weight.parts}) == 1
    return weight.spec.axis == 1 and (joined or (len(weight.parts) == 1 and N % (2 * TILE_ROWS) == 0))


def step_linear(
    x: Tensor,
    weight: TiledWeight,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Return `y + residual`, y being `norm(x) @ W^T + bias` [M, N], or, if gated, `silu(gate) * other` [M, N / 2].

    x [M, K] in the weight's dtype; the gate is the first half of the outputs. Sums in fp32, rounded once at the end.
    Has no gradient. Without a GPU, or where `takes` says no, the same is computed in several steps.

    Raises ShapeError, DtypeError or ConfigError (another device) for tensors that do not go with the weight.
    """
    N, K = weight.spec.shape
    outputs = N // 2 if gated else N
    check_operands(x, bias, weight.meta, N, K)
    for name, tensor, expected in (
        ("norm weight", norm.weight if norm else None, (K,)),
        ("residual", residual, (x.shape[0], outputs)),
    ):
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ShapeError(f"got a {name} of shape {tuple(tensor.shape)}; expected {expected}")
    if not takes(weight, x, gated):
        return _reference(x, weight, bias, norm, gated, residual)
    work = work_with(weight, x.shape[0])._replace(normed=norm is not None, gated=gated)
    out = x.new_empty(x.shape[0], outputs)
    launch_gemv(
        work,
        gemv_config(work, x.device),
        aligned(x),
        weight.codes,
        weight.meta,
        weight.rows,
        None if bias is None else bias.contiguous(),
        out,
        None if norm is None else Norm(aligned(norm.weight), norm.eps),
        None if residual is None else aligned(residual),
    )
    return out


def _reference(
    x: Tensor,
    weight: TiledWeight,
    bias: Tensor | None,
    norm: Norm | None,
    gated: bool,
    residual: Tensor | None,
) -> Tensor:
    """The definition, in fp32."""
    v = x.float()
    if norm is not None:
        v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.float()
    y = F.linear(v, tiled_dequantize(weight).float(), None if bias is None else bias.float())
    if gated:
        gate, other = y.chunk(2, dim=-1)
        y = F.silu(gate) * other
    return (y if residual is None else y + residual.float()).to(x.dtype)
