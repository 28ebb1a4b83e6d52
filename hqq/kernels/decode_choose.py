"""The next token of each row, likeliest or drawn, and what follows from it: the end of a decoding step."""

# Kernels are written in Triton's language, which is not quite Python.
# mypy: ignore-errors

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqq.kernels.decode_advance import Rows, move_on
from hqq.kernels.decode_launch import options
from hqq.kernels.decode_limit import LimitSpace, find_limits, survey
from hqq.kernels.decode_logits import Filters, key_of, penalised
from hqq.kernels.dequant_flow import start_next, wait_for_previous
from hqq.kernels.device import on

_BLOCK = 1024
_NOWHERE = tl.constexpr(0x7FFFFFFF)
_TINY = tl.constexpr(2.0**-126)
_WORST = tl.constexpr(-float("inf"))
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _choose_kernel(
    logits,
    noise,
    seen,
    tops,
    limits,
    best,
    where,
    arrived,
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
    min_p,
    DRAW: tl.constexpr,
    REPEAT: tl.constexpr,
    LIMIT: tl.constexpr,
    MIN_P: tl.constexpr,
    PIECES: tl.constexpr,
    PIECES_PAD: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_PAD: tl.constexpr,
    ENDS: tl.constexpr,
    ENDS_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The best of BLOCK logits for each program; the last one of a row picks the row's best and moves the row on.

    If DRAW, best by the logit over the temperature less the logarithm of an exponential draw, which is best with the
    probability that the softmax gives; only logits within the limits take part.
    """
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    v = block * BLOCK + tl.arange(0, BLOCK)
    if OVERLAP:
        start_next()
        wait_for_previous()
    x = penalised(logits + row * stride, seen + row * V, v, V, penalty, REPEAT)
    if DRAW:
        kept = v < V
        if LIMIT:
            kept = kept & (key_of(x) >= tl.load(limits + row))
        if MIN_P:
            i = tl.arange(0, PIECES_PAD)
            highest = tl.max(tl.load(tops + row * PIECES + i, mask=i < PIECES, other=_WORST), 0)
            kept = kept & (tl.exp2((x - highest) * (_LOG2_E / temperature)) >= min_p)
        # A draw of 0 would make scores of -inf undefined.
        draw = tl.maximum(tl.load(noise + row * V + v, mask=kept, other=1.0), _TINY)
        x = tl.where(kept, x / temperature - tl.log(draw), _WORST)
    top, index = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best + row * BLOCKS + block, top)
    tl.store(where + row * BLOCKS + block, block * BLOCK + index)
    tl.debug_barrier()
    if tl.atomic_add(arrived + row, 1, sem="acq_rel", scope="gpu") == BLOCKS - 1:
        tl.store(arrived + row, 0)
        b = tl.arange(0, BLOCKS_PAD)
        # Written by other processors: the first-level cache may hold what was there before.
        all_tops = tl.load(best + row * BLOCKS + b, mask=b < BLOCKS, other=_WORST, cache_modifier=".cg")
        found = tl.load(where + row * BLOCKS + b, mask=b < BLOCKS, other=_NOWHERE, cache_modifier=".cg")
        # Of equal ones the first token. Where nothing compares (NaN), still a token.
        first = tl.min(tl.where(all_tops == tl.max(all_tops, 0), found, _NOWHERE), 0)
        first = tl.minimum(first, V - 1)
        chosen = move_on(row, first, token, finished, ids, positions, ends, ids_stride, pad, ENDS, ENDS_PAD)
        if REPEAT:
            tl.store(seen + row * V + chosen, 1, mask=chosen < V)


@dataclass(frozen=True)
class ChoiceSpace:
    """Memory that `choose_next` works in; one serves all steps of one batch size and vocabulary."""

    best: Tensor
    where: Tensor
    arrived: Tensor
    limit: LimitSpace

    @classmethod
    def make(cls, rows: int, V: int, device: torch.device) -> ChoiceSpace:
        """Return the memory for `rows` rows of `V` logits."""
        blocks = triton.cdiv(V, _BLOCK)
        return cls(
            torch.empty(rows, blocks, dtype=torch.float32, device=device),
            torch.empty(rows, blocks, dtype=torch.int32, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
            LimitSpace.make(rows, V, device),
        )


def choose_next(
    logits: Tensor,
    rows: Rows,
    filters: Filters,
    noise: Tensor | None,
    seen: Tensor | None,
    space: ChoiceSpace,
) -> None:
    """Choose a token for each row, the first of equally good ones, and move the rows on, all in place.

    logits [B, V] with contiguous rows; noise [B, V] (float32) exponential draws, needed to draw; seen [B, V] (bool) the
    tokens that were there, needed for a penalty, which gets the new ones. One kernel, with min_p two, with top_k or
    top_p three. Of logits that are equal to the last one that top_k or top_p keeps, all stay.
    """
    count, V = logits.shape
    filters = _needed(filters, V)
    seen = None if seen is None or filters.penalty is None else seen.view(torch.int8)
    limited = filters.top_k is not None or filters.top_p is not None
    if limited or filters.min_p is not None:
        survey(logits, filters, seen, space.limit)
    if limited:
        find_limits(logits, filters, seen, space.limit)
    pieces, blocks = space.limit.tops.shape[1], space.best.shape[1]
    with on(logits.device):
        _choose_kernel[(blocks, count)](
            logits,
            logits if noise is None else noise,
            logits if seen is None else seen,
            space.limit.tops,
            space.limit.limits,
            space.best,
            space.where,
            space.arrived,
            *rows.arguments(),
            logits.stride(0),
            V,
            filters.penalty or 1.0,
            filters.temperature,
            filters.min_p or 0.0,
            DRAW=filters.draw,
            REPEAT=filters.penalty is not None,
            LIMIT=limited,
            MIN_P=filters.min_p is not None,
            PIECES=pieces,
            PIECES_PAD=triton.next_power_of_2(pieces),
            BLOCKS=blocks,
            BLOCKS_PAD=triton.next_power_of_2(blocks),
            BLOCK=_BLOCK,
            num_warps=4,
            **rows.constants(),
            **options(logits.device, logits.dtype),
        )


def _needed(filters: Filters, V: int) -> Filters:
    """Return `filters` without those that keep every token."""
    if not filters.draw:
        return Filters(penalty=filters.penalty)
    top_k = None if filters.top_k is None or filters.top_k >= V else filters.top_k
    top_p = None if filters.top_p is None or filters.top_p >= 1 else filters.top_p
    return replace(filters, top_k=top_k, top_p=top_p, min_p=filters.min_p or None)
