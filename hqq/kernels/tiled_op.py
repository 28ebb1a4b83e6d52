"""`hqq::tiled_linear` as a torch operator: the product of activations with a tiled weight."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hqq.errors import ConfigError, DtypeError, ShapeError
from hqq.kernels.cuda import unavailable_reason
from hqq.kernels.tile_dequant import tile_dequantize
from hqq.kernels.tile_layout import BLOCK_INPUTS, TILE_ROWS
from hqq.kernels.tiled_gemm import gemm_unavailable_reason, tiled_gemm
from hqq.kernels.tiled_gemm_config import most_tokens
from hqq.kernels.tiled_gemv import launch_gemv
from hqq.kernels.tiled_gemv_config import MAX_TOKENS, GemvWork
from hqq.kernels.tiled_reference import dequantize_tiles
from hqq.kernels.tiled_tune import gemv_config
from hqq.kernels.tiled_weight import TiledWeight

_ALIGNMENT = 16
_MANY_OUTPUTS = 8192
# Tokens up to which going over the weight again for every 8 of them costs less than dequantising it.
_GEMV_TOKENS = 24
_ARGUMENTS = "Tensor codes, Tensor meta, Tensor rows, int bits, int axis, int group_size, int N, int K"
LIBRARY = torch.library.Library("hqq", "FRAGMENT")  # type: ignore[no-untyped-call]
for schema in (
    f"tiled_linear(Tensor x, Tensor? bias, {_ARGUMENTS}) -> Tensor",
    f"tiled_dequantize({_ARGUMENTS}) -> Tensor",
):
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]


def tiled_linear(x: Tensor, weight: TiledWeight, bias: Tensor | None = None) -> Tensor:
    """Return `x @ W^T + bias`: x [..., K] in the weight's dtype, bias [N] or None, result [..., N].

    Products are summed in fp32; the same input gives the same bits every time. Gradients reach x and bias.

    Raises ShapeError, DtypeError or ConfigError (another device) for tensors that do not go with the weight.
    """
    result: Tensor = torch.ops.hqq.tiled_linear(x, bias, *_arguments(weight))
    return result


def tiled_dequantize(weight: TiledWeight) -> Tensor:
    """Return the weight [N, K] in its dtype; joined weights one below the other."""
    result: Tensor = torch.ops.hqq.tiled_dequantize(*_arguments(weight))
    return result


def _arguments(weight: TiledWeight) -> tuple[Any, ...]:
    N, K = weight.spec.shape
    shape = (weight.bits, weight.spec.axis, weight.group_size, N, K)
    return (weight.codes, weight.meta, weight.rows, *shape)


def check_operands(x: Tensor, bias: Tensor | None, meta: Tensor, N: int, K: int) -> None:
    """Raise ShapeError, DtypeError or ConfigError for an input or a bias that does not go with a weight [N, K]."""
    if x.ndim == 0 or x.shape[-1] != K:
        raise ShapeError(
            f"got input of shape {tuple(x.shape)}; the weight [{N}, {K}] takes {K} in the last dimension"
        )
    if bias is not None and tuple(bias.shape) != (N,):
        raise ShapeError(f"got a bias of shape {tuple(bias.shape)}; expected ({N},)")
    for name, tensor in (("input", x), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != meta.dtype:
            raise DtypeError(f"got {name} of {tensor.dtype}; the weight was prepared for {meta.dtype}")
        if tensor.device != meta.device:
            raise ConfigError(f"got {name} on {tensor.device}; the weight is on {meta.device}")


def _linear(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    meta, N, K = weight[1], weight[-2], weight[-1]
    check_operands(x, bias, meta, N, K)
    return F.linear(x, dequantize_tiles(*weight), bias)


def _linear_cuda(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    """Multiply by the kernel for the number of tokens; many are cheapest with the weight dequantised once."""
    codes, meta, rows, bits, axis, group_size, N, K = weight
    check_operands(x, bias, meta, N, K)
    M = x.numel() // K
    work = GemvWork(meta.dtype, bits, axis, group_size, N, K, M)
    route = route_on(work, x.device)
    if M == 0 or route == "reference":
        return _linear(x, bias, *weight)
    if route == "dequantize":
        return F.linear(x, tile_dequantize(codes, meta, rows, bits, axis, group_size, N, K), bias)
    rows_of_x = aligned(x.reshape(M, K))
    if bias is not None:
        bias = bias.contiguous()
    out = x.new_empty((*x.shape[:-1], N))
    if route == "gemv":
        config = gemv_config(work, x.device)
        launch_gemv(work, config, rows_of_x, codes, meta, rows, bias, out)
    else:
        tiled_gemm(rows_of_x, codes, meta, rows, bits, axis, group_size, N, K, bias, out.view(M, N))
    return out


def aligned(tensor: Tensor) -> Tensor:
    """Return `tensor`, or a copy of it, contiguous and where kernels can load it 16 bytes at a time."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def route_on(work: GemvWork, device: torch.device) -> str:
    """Return which kernel takes `work` on a CUDA device: "gemv", "gemm", "dequantize" or, without any, "reference"."""
    fused, gemm = _kernels_on(device)
    return _route(work, gemm) if fused else "reference"


@cache
def _kernels_on(device: torch.device) -> tuple[bool, bool]:
    """Return whether the fused kernels run on `device`, and the GEMM among them: asked once, not for every product."""
    return unavailable_reason(device) is None, gemm_unavailable_reason(device) is None


def _route(work: GemvWork, gemm: bool) -> str:
    """Return which kernel takes `work`, by what an H200 measured: it was the faster one there."""
    if work.K % TILE_ROWS:
        return "dequantize"
    if work.tokens <= (_tokens_before_gemm(work) if gemm else _GEMV_TOKENS):
        return "gemv"
    return "gemm" if gemm and work.tokens <= most_tokens(work.N, work.K, work.axis) else "dequantize"


def _tokens_before_gemm(work: GemvWork) -> int:
    """Return up to how many tokens gemv is ahead of the GEMM, which takes as long for one as for sixteen."""
    most = MAX_TOKENS
    if work.axis == 1 and work.group_size < BLOCK_INPUTS // 2:
        most //= 2  # more passes than there are slots for groups of a block
    if work.N >= _MANY_OUTPUTS and (work.axis == 0 or work.group_size < BLOCK_INPUTS):
        most //= 2
    return most


def _dequantize_cuda(*weight: Any) -> Tensor:
    fused, _ = _kernels_on(weight[0].device)
    return tile_dequantize(*weight) if fused else dequantize_tiles(*weight)


def _linear_fake(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    meta, N, K = weight[1], weight[-2], weight[-1]
    check_operands(x, bias, meta, N, K)
    return x.new_empty((*x.shape[:-1], N))


def _dequantize_fake(codes: Tensor, meta: Tensor, *rest: Any) -> Tensor:
    return meta.new_empty(rest[-2:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, codes, meta, rows, *shape = inputs
    ctx.save_for_backward(codes, meta, rows)
    ctx.shape = shape


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ torch.ops.hqq.tiled_dequantize(*ctx.saved_tensors, *ctx.shape)
    if ctx.needs_input_grad[1]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return (grad_x, grad_bias, *(None,) * 8)


LIBRARY.impl("tiled_linear", _linear, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
LIBRARY.impl("tiled_linear", _linear_cuda, "CUDA")  # type: ignore[no-untyped-call]
LIBRARY.impl("tiled_dequantize", dequantize_tiles, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
LIBRARY.impl("tiled_dequantize", _dequantize_cuda, "CUDA")  # type: ignore[no-untyped-call]
torch.library.register_fake("hqq::tiled_linear", _linear_fake, lib=LIBRARY)
torch.library.register_fake("hqq::tiled_dequantize", _dequantize_fake, lib=LIBRARY)
torch.library.register_autograd("hqq::tiled_linear", _backward, setup_context=_setup_context, lib=LIBRARY)
