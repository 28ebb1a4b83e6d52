"""`hqq::tiled_linear` as a torch operator: the product of activations with a tiled weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hqq.errors import ConfigError, DtypeError, ShapeError
from hqq.kernels.tiled_reference import dequantize_tiles
from hqq.kernels.tiled_weight import TiledWeight

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


def _check(x: Tensor, bias: Tensor | None, meta: Tensor, N: int, K: int) -> None:
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
    _check(x, bias, meta, N, K)
    return F.linear(x, dequantize_tiles(*weight), bias)


def _linear_fake(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    meta, N, K = weight[1], weight[-2], weight[-1]
    _check(x, bias, meta, N, K)
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
LIBRARY.impl("tiled_dequantize", dequantize_tiles, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("hqq::tiled_linear", _linear_fake, lib=LIBRARY)
torch.library.register_fake("hqq::tiled_dequantize", _dequantize_fake, lib=LIBRARY)
torch.library.register_autograd("hqq::tiled_linear", _backward, setup_context=_setup_context, lib=LIBRARY)
