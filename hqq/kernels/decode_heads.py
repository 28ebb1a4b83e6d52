"""The new query, key and value heads of a decoding step: normalised where the model does that, and rotated."""

# Written in Triton's language, which is not quite Python.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from hqq.kernels.rounding import rounded


@triton.jit
def rotation(cos, sin, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr):
    """Cosine and sine of one position, the sine negative for the first half, in fp32."""
    d = tl.arange(0, HEAD_PAD)
    c = tl.load(cos + d, mask=d < HEAD, other=0.0).to(tl.float32)
    s = tl.load(sin + d, mask=d < HEAD, other=0.0).to(tl.float32)
    return c, tl.where(d < HEAD // 2, -s, s)


@triton.jit
def new_heads(
    q,
    k,
    v,
    c,
    s,
    q_weight,
    k_weight,
    eps,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    NORMED: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Query [GROUP_PAD, HEAD_PAD], key and value [HEAD_PAD] in fp32, holding values of DTYPE; padding is 0.

    Rotary embedding (Su et al. 2021) in halves, as transformers writes it: x * cos + (-x2, x1) * sin.
    """
    d = tl.arange(0, HEAD_PAD)
    g = tl.arange(0, GROUP_PAD)
    inside = d < HEAD
    real = (g < GROUP)[:, None] & inside[None, :]
    other = tl.where(d < HEAD // 2, d + HEAD // 2, d - HEAD // 2)
    query = tl.load(q + g[:, None] * HEAD + d[None, :], mask=real, other=0.0).to(tl.float32)
    query_other = tl.load(q + g[:, None] * HEAD + other[None, :], mask=real, other=0.0).to(tl.float32)
    key = tl.load(k + d, mask=inside, other=0.0).to(tl.float32)
    key_other = tl.load(k + other, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(v + d, mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        by_query = tl.rsqrt(tl.sum(query * query, 1) / HEAD + eps)[:, None]
        by_key = tl.rsqrt(tl.sum(key * key, 0) / HEAD + eps)
        query = _weighted(query * by_query, (q_weight + d)[None, :], inside[None, :], DTYPE, INTERPRETED)
        query_other = _weighted(
            query_other * by_query, (q_weight + other)[None, :], inside[None, :], DTYPE, INTERPRETED
        )
        key = _weighted(key * by_key, k_weight + d, inside, DTYPE, INTERPRETED)
        key_other = _weighted(key_other * by_key, k_weight + other, inside, DTYPE, INTERPRETED)
    query = _rotated(query, query_other, c[None, :], s[None, :], DTYPE, INTERPRETED)
    return query, _rotated(key, key_other, c, s, DTYPE, INTERPRETED), value


@triton.jit
def _weighted(x, weight, there, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    w = tl.load(weight, mask=there, other=0.0).to(tl.float32)
    return rounded(w * rounded(x, DTYPE, INTERPRETED), DTYPE, INTERPRETED)


@triton.jit
def _rotated(x, other, c, s, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    a, b = rounded(x * c, DTYPE, INTERPRETED), rounded(other * s, DTYPE, INTERPRETED)
    return rounded(a + b, DTYPE, INTERPRETED)
