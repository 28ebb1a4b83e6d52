"""Drawing the next token of each row: all of `Sampling` in one kernel, without sorting."""

# Kernels are written in Triton's language, which is not quite Python.
# mypy: ignore-errors

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqq.kernels.decode_advance import Rows, move_on
from hqq.kernels.decode_launch import on, options
from hqq.kernels.dequant_flow import start_next, wait_for_previous

_BLOCK = 4096
_WARPS = 16
# Of the bits of a float32, those that a logit of this dtype leaves 0; even, since two bits are searched at a time.
_FREE_BITS = {torch.bfloat16: 16, torch.float16: 12, torch.float32: 0}

_LEAST = tl.constexpr(-(2**31))
_TINY = tl.constexpr(2.0**-126)
_WORST = tl.constexpr(-float("inf"))
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _values(logits, seen, v, V, penalty, REPEAT: tl.constexpr):
    """Logits in fp32 after the repetition penalty; -inf beyond the end."""
    x = tl.load(logits + v, mask=v < V, other=_WORST).to(tl.float32)
    if REPEAT:
        there = tl.load(seen + v, mask=v < V, other=0) != 0
        x = tl.where(there, tl.where(x > 0, x / penalty, x * penalty), x)
    return x


@triton.jit
def _key(x):
    """Integers in the order of the floats; 0 and -0 are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _limit(
    logits,
    seen,
    tops,
    V,
    penalty,
    factor,
    best,
    floor,
    goal,
    MASS: tl.constexpr,
    REPEAT: tl.constexpr,
    LOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest key from which on there are `goal` logits or, if MASS, from `floor` on, so much probability.

    Two bits of the key at a time: three limits are counted in each pass over the logits. Blocks whose largest logit is
    below the first of them are passed by.
    """
    limit = tl.cast(_LEAST, tl.int32)
    for step in range((32 - LOW) // 2):
        unit = 1 << (30 - 2 * step)
        one, two, three = limit + unit, limit + unit + unit, limit + unit + unit + unit
        a = tl.zeros([BLOCK], tl.float32)
        b = tl.zeros([BLOCK], tl.float32)
        c = tl.zeros([BLOCK], tl.float32)
        for block in range(0, V, BLOCK):
            if tl.load(tops + block // BLOCK) >= tl.maximum(one, floor):
                x = _values(logits, seen, block + tl.arange(0, BLOCK), V, penalty, REPEAT)
                key = _key(x)
                weight = tl.exp2((x - best) * factor) if MASS else tl.full([BLOCK], 1.0, tl.float32)
                weight = tl.where(key >= floor, weight, 0.0)
                a += tl.where(key >= one, weight, 0.0)
                b += tl.where(key >= two, weight, 0.0)
                c += tl.where(key >= three, weight, 0.0)
        enough = (tl.sum(a, 0) >= goal).to(tl.int32) + (tl.sum(b, 0) >= goal).to(tl.int32)
        enough += (tl.sum(c, 0) >= goal).to(tl.int32)
        limit += enough * unit
    return limit


@triton.jit
def _sample_kernel(
    logits,
    noise,
    seen,
    tops,
    token,
    finished,
    ids,
    positions,
    ends,
    ids_stride,
    pad,
    stride,
    V,
    penalty,
    temperature,
    top_k,
    top_p,
    min_p,
    DRAW: tl.constexpr,
    REPEAT: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    ENDS: tl.constexpr,
    ENDS_PAD: tl.constexpr,
    LOW: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row for each program: penalty, temperature, top-k, top-p, min-p, and the smallest of exponential draws."""
    row = tl.program_id(0).to(tl.int64)
    logits, noise, seen, tops = logits + row * stride, noise + row * V, seen + row * V, tops + row * BLOCKS
    if OVERLAP:
        start_next()
        wait_for_previous()
    highest = tl.full([BLOCK], _WORST, tl.float32)
    for block in range(0, V, BLOCK):
        x = _values(logits, seen, block + tl.arange(0, BLOCK), V, penalty, REPEAT)
        tl.store(tops + block // BLOCK, tl.max(_key(x), 0))
        highest = tl.maximum(highest, x)
    tl.debug_barrier()
    best = tl.max(highest, 0)
    factor = _LOG2_E / temperature
    limit = tl.cast(_LEAST, tl.int32)
    if TOP_K:
        limit = _limit(logits, seen, tops, V, penalty, factor, best, limit, top_k, False, REPEAT, LOW, BLOCK)
    if TOP_P:
        total = tl.zeros([BLOCK], tl.float32)
        for block in range(0, V, BLOCK):
            if tl.load(tops + block // BLOCK) >= limit:
                x = _values(logits, seen, block + tl.arange(0, BLOCK), V, penalty, REPEAT)
                total += tl.where(_key(x) >= limit, tl.exp2((x - best) * factor), 0.0)
        limit = _limit(
            logits,
            seen,
            tops,
            V,
            penalty,
            factor,
            best,
            limit,
            tl.sum(total, 0) * top_p,
            True,
            REPEAT,
            LOW,
            BLOCK,
        )
    score = tl.full([BLOCK], _WORST, tl.float32)
    index = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    for block in range(0, V, BLOCK):
        if tl.load(tops + block // BLOCK) >= limit:
            v = block + tl.arange(0, BLOCK)
            x = _values(logits, seen, v, V, penalty, REPEAT)
            kept = (_key(x) >= limit) & (v < V)
            if MIN_P:
                kept = kept & (tl.exp2((x - best) * factor) >= min_p)
            if DRAW:
                # A draw of 0 would make scores of -inf undefined.
                draw = tl.maximum(tl.load(noise + v, mask=kept, other=1.0), _TINY)
                x = x / temperature - tl.log(draw)
            better = kept & (x > score)
            score, index = tl.where(better, x, score), tl.where(better, v, index)
    first = tl.min(tl.where(score == tl.max(score, 0), index, 0x7FFFFFFF), 0)
    chosen = move_on(
        row, tl.minimum(first, V - 1), token, finished, ids, positions, ends, ids_stride, pad, ENDS, ENDS_PAD
    )
    if REPEAT:
        tl.store(seen + chosen, 1)


@dataclass(frozen=True)
class Filters:
    """How tokens are drawn, as `Sampling` has it; None leaves a filter out, and `draw` False takes the likeliest."""

    draw: bool
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    penalty: float | None = None


def sample_space(rows: int, V: int, device: torch.device) -> Tensor:
    """Return the memory that `sample_advance` works in, for `rows` rows of `V` logits."""
    return torch.empty(rows, triton.cdiv(V, _BLOCK), dtype=torch.int32, device=device)


def sample_advance(
    logits: Tensor,
    rows: Rows,
    filters: Filters,
    noise: Tensor | None,
    seen: Tensor | None,
    space: Tensor,
) -> None:
    """Draw a token for each row and move the rows on, all in place.

    logits [B, V] with contiguous rows; noise [B, V] (float32) exponential draws, needed to draw; seen [B, V] (bool) the
    tokens that were there, needed for a penalty, which gets the new ones. Of logits that are equal to the last one that
    top-k or top-p keeps, all stay.
    """
    count, V = logits.shape
    top_k = None if filters.top_k is None or filters.top_k >= V else filters.top_k
    top_p = None if filters.top_p is None or filters.top_p >= 1 else filters.top_p
    repeat = filters.penalty is not None
    low = 0 if repeat else _FREE_BITS[logits.dtype]
    with on(logits.device):
        _sample_kernel[(count,)](
            logits,
            logits if noise is None else noise,
            logits if seen is None else seen.view(torch.int8),
            space,
            *rows.arguments(),
            logits.stride(0),
            V,
            filters.penalty or 1.0,
            filters.temperature,
            float(top_k or 0),
            top_p or 1.0,
            filters.min_p or 0.0,
            DRAW=filters.draw,
            REPEAT=repeat,
            TOP_K=filters.draw and top_k is not None,
            TOP_P=filters.draw and top_p is not None,
            MIN_P=filters.draw and filters.min_p is not None,
            LOW=low,
            BLOCKS=space.shape[1],
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            **rows.constants(),
            **options(logits.device, logits.dtype),
        )
