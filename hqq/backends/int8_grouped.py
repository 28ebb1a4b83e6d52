"""`hqq::int8_grouped_linear`: torch's int8 product on the CPU, one call for each group of inputs."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("hqq::int8_grouped_linear", mutates_args=())
def int8_grouped_linear(x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Return `y[m, n] = Σ_g scale[g, n] Σ_k x[m, g, k] codes[g, n, k] + Σ_g offset[g, n] Σ_k x[m, g, k]`.

    x [M, K]; codes [G, N, K / G] int8; scale [G, N] in x's dtype; offset [G, N] float32; y [M, N] in x's dtype. The
    parts of the groups are rounded to x's dtype, their sum is kept in float32.
    """
    M, G, size = x.shape[0], codes.shape[0], codes.shape[2]
    if G == 1:
        y = torch._weight_int8pack_mm(x, codes[0], scale[0]).float()
        return y.addmm_(x.float().sum(1, keepdim=True), offset).to(x.dtype)
    parts = x.reshape(M, G, size).transpose(0, 1).contiguous()
    y = parts.sum(-1, dtype=torch.float32).t() @ offset
    for part, group_codes, group_scale in zip(parts, codes, scale, strict=True):
        y += torch._weight_int8pack_mm(part, group_codes, group_scale)
    return y.to(x.dtype)


@int8_grouped_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[1]))
