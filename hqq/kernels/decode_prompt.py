"""Heads of a prompt: queries normalised where the model does that, and rotated; keys and values into the cache."""

# Kernels are written in Triton's language, which is not quite Python.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hqq.kernels import decode_launch
from hqq.kernels.decode_attention import HeadNorm
from hqq.kernels.decode_heads import new_heads, rotation
from hqq.kernels.decode_launch import options
from hqq.kernels.dequant_flow import start_next, wait_for_previous
from hqq.kernels.device import on


@triton.jit
def _prompt_heads_kernel(
    q,
    k,
    v,
    keys,
    values,
    cos,
    sin,
    q_weight,
    k_weight,
    begins,
    out,
    q_stride,
    k_stride,
    v_stride,
    length,
    eps,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    NORMED: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One key head of one token of one row, and the GROUP query heads that go with it."""
    place, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    turn = tl.maximum(place - tl.load(begins + row), 0)
    c, s = rotation(cos + turn * HEAD, sin + turn * HEAD, HEAD, HEAD_PAD)
    token = row.to(tl.int64) * tl.num_programs(0) + place
    if OVERLAP:
        start_next()
        wait_for_previous()
    query, key, value = new_heads(
        q + token * q_stride + head * GROUP * HEAD,
        k + token * k_stride + head * HEAD,
        v + token * v_stride + head * HEAD,
        c,
        s,
        q_weight,
        k_weight,
        eps,
        GROUP,
        GROUP_PAD,
        HEAD,
        HEAD_PAD,
        NORMED,
        DTYPE,
        INTERPRETED,
    )
    d, g = tl.arange(0, HEAD_PAD), tl.arange(0, GROUP_PAD)
    inside = d < HEAD
    heads = out + (token * KV_HEADS + head) * GROUP * HEAD
    tl.store(
        heads + g[:, None] * HEAD + d[None, :],
        query.to(DTYPE),
        mask=(g < GROUP)[:, None] & inside[None, :],
    )
    new = ((row * KV_HEADS + head).to(tl.int64) * length + place) * HEAD + d
    tl.store(keys + new, key.to(DTYPE), mask=inside)
    tl.store(values + new, value.to(DTYPE), mask=inside)


def prompt_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    begins: Tensor,
    norm: HeadNorm | None = None,
) -> Tensor:
    """Rotate queries and keys of prompts, put keys and values into the cache, and return the queries [B * M, H * D].

    q [B * M, H * D], k and v [B * M, KV * D] with contiguous rows; the rest as `decode_attention` has it. The M tokens
    go to the first places of the cache [B, KV, length, D]; what stands before a row's beginning is padding.
    """
    rows, kv_heads, length, head = keys.shape
    group = q.shape[1] // (kv_heads * head)
    out = decode_launch.new_output(q, q.shape[1])
    weights = (q, k) if norm is None else (norm.q, norm.k)
    with on(q.device):
        _prompt_heads_kernel[(q.shape[0] // rows, kv_heads, rows)](
            q,
            k,
            v,
            keys,
            values,
            cos,
            sin,
            *weights,
            begins,
            out,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            length,
            0.0 if norm is None else norm.eps,
            KV_HEADS=kv_heads,
            GROUP=group,
            GROUP_PAD=triton.next_power_of_2(group),
            HEAD=head,
            HEAD_PAD=max(16, triton.next_power_of_2(head)),
            NORMED=norm is not None,
            num_warps=1,
            **options(q.device, q.dtype),
        )
    return out
