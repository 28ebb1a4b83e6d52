"""Flash decoding: the kernels of `decode_attention`, for a part of the cache, and to join the parts."""

# Kernels are written in Triton's language, which is not quite Python.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from hqq.kernels.decode_heads import new_heads, rotation
from hqq.kernels.dequant_flow import start_next, wait_for_previous
from hqq.kernels.rounding import rounded

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_kernel(
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
    positions,
    sums,
    stats,
    out,
    q_stride,
    k_stride,
    v_stride,
    length,
    window,
    scale,
    eps,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    NORMED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    DOT: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One of SPLITS parts of the filled cache for one row and the GROUP query heads of one key head.

    Flash decoding: each part keeps its largest score, the sum of exponentials and the weighted sum of values, which
    `join_kernel` puts together; a single part is the result. The first part also has the new token, whose key and
    value it writes into the cache. AHEAD asks for each block of the cache while the one before is worked on, the first
    one before anything else; otherwise that is left to Triton.
    """
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # A step too many writes where the last one did, and nowhere else.
    position, begin = tl.minimum(tl.load(positions + row), length - 1), tl.load(begins + row)
    lowest, each, used = _parts(position, begin, window, SPLITS, BLOCK)
    if split >= used:
        if OVERLAP:
            wait_for_previous()
        return
    d = tl.arange(0, HEAD_PAD)
    inside = d < HEAD
    owner = (row * KV_HEADS + head).to(tl.int64)
    cache = owner * length * HEAD
    first = lowest + split * each * BLOCK
    stop = tl.minimum(first + each * BLOCK, position)
    if AHEAD:
        # What the cache holds from earlier steps does not wait for the kernels before this one.
        next_key, next_value = _block(keys, values, cache, first, stop, d, HEAD, BLOCK)
    c, s = rotation(cos + (position - begin) * HEAD, sin + (position - begin) * HEAD, HEAD, HEAD_PAD)
    if OVERLAP:
        wait_for_previous()
        start_next()
    query, new_key, new_value = new_heads(
        q + row.to(tl.int64) * q_stride + head * GROUP * HEAD,
        k + row.to(tl.int64) * k_stride + head * HEAD,
        v + row.to(tl.int64) * v_stride + head * HEAD,
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
    own = split == 0
    new = cache + position * HEAD + d
    mine = d < tl.where(own, HEAD, 0)
    tl.store(keys + new, new_key.to(DTYPE), mask=mine)
    tl.store(values + new, new_value.to(DTYPE), mask=mine)
    scale = scale * _LOG2_E
    top = tl.where(own, tl.sum(query * new_key[None, :], 1) * scale, -float("inf"))
    total = tl.where(own, 1.0, 0.0) + tl.zeros([GROUP_PAD], tl.float32)
    result = tl.where(own, new_value, 0.0)[None, :] + tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
    query = query.to(DOT)
    for start in range(first, stop, BLOCK):
        if AHEAD:
            key, value = next_key, next_value
            next_key, next_value = _block(keys, values, cache, start + BLOCK, stop, d, HEAD, BLOCK)
        else:
            key, value = _block(keys, values, cache, start, stop, d, HEAD, BLOCK)
        n = start + tl.arange(0, BLOCK)
        score = tl.dot(query, tl.trans(key.to(DOT)), input_precision="ieee") * scale
        score = tl.where((n < stop)[None, :], score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        p = tl.exp2(score - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(p, 1)
        p = rounded(p, DTYPE, INTERPRETED).to(DOT)
        result = result * fade[:, None] + tl.dot(p, value.to(DOT), input_precision="ieee")
        top = higher
    g = tl.arange(0, GROUP_PAD)
    real = (g < GROUP)[:, None] & inside[None, :]
    heads = owner * GROUP * HEAD
    if SPLITS == 1:
        tl.store(
            out + heads + g[:, None] * HEAD + d[None, :],
            rounded(result / total[:, None], DTYPE, INTERPRETED).to(DTYPE),
            mask=real,
        )
    else:
        part = (owner * SPLITS + split) * GROUP + g
        tl.store(sums + part[:, None] * HEAD + d[None, :], result, mask=real)
        tl.store(stats + part * 2, top, mask=g < GROUP)
        tl.store(stats + part * 2 + 1, total, mask=g < GROUP)


@triton.jit
def _block(keys, values, cache, start, stop, d, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """Keys and values of BLOCK places from `start` on; 0 from `stop` on."""
    n = start + tl.arange(0, BLOCK)
    at = cache + n[:, None] * HEAD + d[None, :]
    there = (n < stop)[:, None] & (d < HEAD)[None, :]
    return tl.load(keys + at, mask=there, other=0.0), tl.load(values + at, mask=there, other=0.0)


@triton.jit
def _parts(position, begin, window, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """The first place of the cache that is seen, the blocks in each part, and how many parts have any."""
    lowest = tl.maximum(begin, position - window + 1)
    blocks = (position - lowest + BLOCK - 1) // BLOCK
    each = tl.maximum((blocks + SPLITS - 1) // SPLITS, 1)
    return lowest, each, tl.maximum((blocks + each - 1) // each, 1)


@triton.jit
def join_kernel(
    sums,
    stats,
    begins,
    positions,
    out,
    length,
    window,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The parts of one query head of one row as one result, always in the same order."""
    head, row = tl.program_id(0), tl.program_id(1)
    position = tl.minimum(tl.load(positions + row), length - 1)
    _, _, used = _parts(position, tl.load(begins + row), window, SPLITS, BLOCK)
    d = tl.arange(0, HEAD_PAD)
    s = tl.arange(0, SPLITS)
    owner = (row * (HEADS // GROUP) + head // GROUP).to(tl.int64)
    part = (owner * SPLITS + s) * GROUP + head % GROUP
    there = (s < used)[:, None] & (d < HEAD)[None, :]
    if OVERLAP:
        start_next()
        wait_for_previous()
    mine = tl.load(sums + part[:, None] * HEAD + d[None, :], mask=there, other=0.0)
    top = tl.load(stats + part * 2, mask=s < used, other=-float("inf"))
    total = tl.load(stats + part * 2 + 1, mask=s < used, other=0.0)
    weight = tl.exp2(top - tl.max(top, 0))
    joined = tl.sum(weight[:, None] * mine, 0) / tl.sum(weight * total, 0)
    at = (row.to(tl.int64) * HEADS + head) * HEAD + d
    tl.store(out + at, rounded(joined, DTYPE, INTERPRETED).to(DTYPE), mask=d < HEAD)
