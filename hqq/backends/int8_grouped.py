"""`hqq::int8_grouped_linear`: products with int8 codes in groups, on the CPU, out of what torch has for that."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# For so many tokens torch's int8 product, called for each group, is faster than multiplying by floats (measured).
_FEW = 8
# Rows that are made floats at a time: what they take stays in the caches.
_ROWS = 256


@torch.library.custom_op("hqq::int8_grouped_linear", mutates_args=())
def int8_grouped_linear(x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Return `y[m, n] = Σ_g scale[g, n] Σ_k x[m, g, k] codes[g, n, k] + Σ_g offset[g, n] Σ_k x[m, g, k]`.

    x [M, K]; codes [G, N, K / G] int8; scale [G, N] in x's dtype; offset [G, N] float32; y [M, N] in x's dtype. The
    parts that are summed are rounded to x's dtype, their sum is kept in float32.
    """
    M, G = x.shape[0], codes.shape[0]
    sums = x.reshape(M, G, x.shape[1] // G).sum(-1, dtype=torch.float32)
    if G == 1:
        y = torch._weight_int8pack_mm(x, codes[0], scale[0]).float()
        return y.addmm_(sums, offset).to(x.dtype)
    y = _by_group(x, codes, scale) if M <= _FEW else _by_rows(x, codes, scale)
    return torch.addmm(y.float(), sums, offset).to(x.dtype)


def _by_group(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    G, N, size = codes.shape
    y = torch.zeros(x.shape[0], N)
    for part, its_codes, its_scale in zip(
        x.reshape(x.shape[0], G, size).unbind(1), codes, scale, strict=True
    ):
        y += torch._weight_int8pack_mm(part.contiguous(), its_codes, its_scale)
    return y


def _by_rows(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    G, N, size = codes.shape
    y = x.new_empty(x.shape[0], N)
    floats = x.new_empty(min(N, _ROWS), G, size)
    for start in range(0, N, _ROWS):
        rows = slice(start, min(start + _ROWS, N))
        W = floats[: rows.stop - start]
        torch.mul(codes[:, rows].transpose(0, 1), scale[:, rows].t()[..., None], out=W)
        y[:, rows] = F.linear(x, W.reshape(-1, G * size))
    return y


@int8_grouped_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[1]))
