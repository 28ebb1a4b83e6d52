"""The kernels of `decode_limit`: one that surveys the logits, and one that searches them for the limits."""

# Kernels are written in Triton's language, which is not quite Python.
# mypy: ignore-errors
# ruff: noqa: SIM108

from __future__ import annotations

import triton
import triton.language as tl

from hqq.kernels.decode_logits import key_of, penalised
from hqq.kernels.dequant_flow import start_next, wait_for_previous

_LEAST = tl.constexpr(-(2**31))
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def survey_kernel(
    logits,
    seen,
    tops,
    masses,
    stride,
    V,
    penalty,
    temperature,
    REPEAT: tl.constexpr,
    PIECES: tl.constexpr,
    SURVEYED: tl.constexpr,
    PIECE: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The largest logit of each piece, and the sum of the piece's exponentials relative to that."""
    row = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(0) * SURVEYED + tl.arange(0, SURVEYED)
    if OVERLAP:
        start_next()
        wait_for_previous()
    v = piece[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
    x = penalised(logits + row * stride, seen + row * V, v, V, penalty, REPEAT)
    top = tl.max(x, 1)
    base = tl.where(top == -float("inf"), 0.0, top)[:, None]
    mass = tl.sum(tl.exp2((x - base) * (_LOG2_E / temperature)), 1)
    tl.store(tops + row * PIECES + piece, top, mask=piece < PIECES)
    tl.store(masses + row * PIECES + piece, mass, mask=piece < PIECES)


@triton.jit
def limit_kernel(
    logits,
    seen,
    tops,
    masses,
    chosen,
    limits,
    stride,
    V,
    penalty,
    temperature,
    top_k,
    top_p,
    REPEAT: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    LOW: tl.constexpr,
    PIECES: tl.constexpr,
    PIECES_PAD: tl.constexpr,
    READ: tl.constexpr,
    PIECE: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The key of the least logit of one row that may be drawn: one program for each row.

    Only pieces that can hold logits within the limit are read. The k-th largest of the pieces' largest logits is not
    above the k-th largest logit; and logits that together weigh less than 1 - top_p are outside of top-p.
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PIECES_PAD)
    logits, seen, chosen = logits + row * stride, seen + row * V, chosen + row * PIECES
    if OVERLAP:
        start_next()
        wait_for_previous()
    top = tl.load(tops + row * PIECES + i, mask=i < PIECES, other=-float("inf"))
    best = tl.max(top, 0)
    factor = _LOG2_E / temperature
    keys = tl.where(i < PIECES, key_of(top), _LEAST)
    if TOP_K:
        floor = _kth_key(keys, top_k)
    else:
        floor = key_of(best + temperature * tl.log((1 - top_p) / V))
    wanted = (keys >= floor) & (i < PIECES)
    # The pieces to read, one behind the other.
    count = tl.sum(wanted.to(tl.int32), 0)
    tl.store(chosen + tl.cumsum(wanted.to(tl.int32), 0) - 1, i, mask=wanted)
    tl.debug_barrier()
    limit = floor
    if TOP_K:
        limit = _search(
            logits, seen, chosen, count, V, penalty, factor, best, floor, top_k, 0, REPEAT, LOW, READ, PIECE
        )
    if TOP_P:
        if TOP_K:
            goal = top_p * _mass(
                logits, seen, chosen, count, V, penalty, factor, best, limit, REPEAT, READ, PIECE
            )
        else:
            mass = tl.load(masses + row * PIECES + i, mask=i < PIECES, other=0.0)
            goal = top_p * tl.sum(mass * tl.exp2((top - best) * factor), 0)
        limit = _search(
            logits, seen, chosen, count, V, penalty, factor, best, limit, goal, 1, REPEAT, LOW, READ, PIECE
        )
    tl.store(limits + row, limit)


@triton.jit
def _kth_key(keys, k):
    """The largest key of which there are `k` as large among `keys`, or the least one."""
    limit = tl.cast(_LEAST, tl.int32)
    for step in range(16):
        unit = 1 << (30 - 2 * step)
        enough = 0
        for _ in tl.static_range(3):
            limit += unit
            there = tl.sum((keys >= limit).to(tl.float32), 0) >= k
            enough += there.to(tl.int32)
        limit -= (3 - enough) * unit
    return limit


@triton.jit
def _read(
    logits,
    seen,
    chosen,
    first,
    count,
    V,
    penalty,
    REPEAT: tl.constexpr,
    READ: tl.constexpr,
    PIECE: tl.constexpr,
):
    """READ of the chosen pieces; -inf beyond their number."""
    n = first + tl.arange(0, READ)
    piece = tl.load(chosen + n, mask=n < count, other=0)
    v = tl.where(n < count, piece * PIECE, V)[:, None] + tl.arange(0, PIECE)[None, :]
    return penalised(logits, seen, v, V, penalty, REPEAT)


@triton.jit
def _mass(
    logits,
    seen,
    chosen,
    count,
    V,
    penalty,
    factor,
    best,
    floor,
    REPEAT: tl.constexpr,
    READ: tl.constexpr,
    PIECE: tl.constexpr,
):
    """The sum of exponentials, relative to the best, of the logits whose keys are at least `floor`."""
    total = tl.zeros([READ, PIECE], tl.float32)
    for first in range(0, count, READ):
        x = _read(logits, seen, chosen, first, count, V, penalty, REPEAT, READ, PIECE)
        total += tl.where(key_of(x) >= floor, tl.exp2((x - best) * factor), 0.0)
    return tl.sum(tl.sum(total, 1), 0)


@triton.jit
def _search(
    logits,
    seen,
    chosen,
    count,
    V,
    penalty,
    factor,
    best,
    floor,
    goal,
    MASS: tl.constexpr,
    REPEAT: tl.constexpr,
    LOW: tl.constexpr,
    READ: tl.constexpr,
    PIECE: tl.constexpr,
):
    """The largest key from which on there are `goal` logits or, if MASS, so much of what is there from `floor` on.

    Two bits of the key at a time: three limits are tried in each pass over the chosen pieces.
    """
    limit = tl.cast(_LEAST, tl.int32)
    for step in range((32 - LOW) // 2):
        unit = 1 << (30 - 2 * step)
        one, two, three = limit + unit, limit + unit + unit, limit + unit + unit + unit
        a = tl.zeros([READ, PIECE], tl.float32)
        b = tl.zeros([READ, PIECE], tl.float32)
        c = tl.zeros([READ, PIECE], tl.float32)
        for first in range(0, count, READ):
            x = _read(logits, seen, chosen, first, count, V, penalty, REPEAT, READ, PIECE)
            key = key_of(x)
            if MASS:
                weight = tl.where(key >= floor, tl.exp2((x - best) * factor), 0.0)
            else:
                weight = tl.full([READ, PIECE], 1.0, tl.float32)
            a += tl.where(key >= one, weight, 0.0)
            b += tl.where(key >= two, weight, 0.0)
            c += tl.where(key >= three, weight, 0.0)
        enough = (tl.sum(tl.sum(a, 1), 0) >= goal).to(tl.int32)
        enough += (tl.sum(tl.sum(b, 1), 0) >= goal).to(tl.int32)
        enough += (tl.sum(tl.sum(c, 1), 0) >= goal).to(tl.int32)
        limit += enough * unit
    return limit
