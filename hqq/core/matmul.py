"""The product of activations with a quantised weight, with a gradient that keeps no dequantised weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hqq.core.backend import DequantBackend
from hqq.core.qtensor import QSpec


class DequantLinear(torch.autograd.Function):
    """`y = x @ W^T + bias` with W dequantised in the forward and again in the backward pass.

    x [..., K], W_q packed codes of W [N, K], y [..., N]. Gradients: x and bias; codes, scale and zero are constants.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        W_q: Tensor,
        scale: Tensor,
        zero: Tensor,
        spec: QSpec,
        backend: DequantBackend,
        compute_dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(W_q, scale, zero)
        ctx.spec, ctx.backend, ctx.compute_dtype = spec, backend, compute_dtype
        ctx.x_dtype = x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, backend.dequantize(W_q, scale, zero, spec, compute_dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            W_q, scale, zero = ctx.saved_tensors
            W = ctx.backend.dequantize(W_q, scale, zero, ctx.spec, ctx.compute_dtype)
            # Under autocast the output, and so its gradient, may have another dtype than the weight.
            grad_x = (grad_output @ W.to(grad_output.dtype)).to(ctx.x_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[1]:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, grad_bias, None, None, None, None, None, None
