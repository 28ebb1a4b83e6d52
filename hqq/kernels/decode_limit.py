"""Where top-k and top-p end: the least logit of each row that may be drawn, found without sorting."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from hqq.kernels.decode_launch import options
from hqq.kernels.decode_limit_kernel import limit_kernel, survey_kernel
from hqq.kernels.decode_logits import Filters
from hqq.kernels.device import on

# Logits of a piece, of which the largest is kept; pieces that a program surveys, and that one reads at a time.
_PIECE = 256
_SURVEYED = 8
_READ = 32
# Of the bits of a float32, those that a logit of this dtype leaves 0; even, since two bits are searched at a time.
_FREE_BITS = {torch.bfloat16: 16, torch.float16: 12, torch.float32: 0}


@dataclass(frozen=True)
class LimitSpace:
    """What the search for limits works in and finds, for one batch size and vocabulary.

    tops [B, pieces] (float32): the largest logit of each piece; limits [B] (int32): the least key that may be drawn.
    """

    tops: Tensor
    masses: Tensor
    chosen: Tensor
    limits: Tensor

    @classmethod
    def make(cls, rows: int, V: int, device: torch.device) -> LimitSpace:
        """Return the memory for `rows` rows of `V` logits."""
        pieces = triton.cdiv(V, _PIECE)
        floats = torch.empty(2, rows, pieces, dtype=torch.float32, device=device)
        chosen = torch.empty(rows, pieces, dtype=torch.int32, device=device)
        limits = torch.empty(rows, dtype=torch.int32, device=device)
        return cls(floats[0], floats[1], chosen, limits)


def survey(logits: Tensor, filters: Filters, seen: Tensor | None, space: LimitSpace) -> None:
    """Find the largest logit of each piece of each row."""
    count, V = logits.shape
    pieces = space.tops.shape[1]
    with on(logits.device):
        survey_kernel[(triton.cdiv(pieces, _SURVEYED), count)](
            logits,
            logits if seen is None else seen,
            space.tops,
            space.masses,
            logits.stride(0),
            V,
            filters.penalty or 1.0,
            filters.temperature,
            REPEAT=filters.penalty is not None,
            PIECES=pieces,
            SURVEYED=_SURVEYED,
            PIECE=_PIECE,
            num_warps=8,
            **options(logits.device, logits.dtype),
        )


def find_limits(logits: Tensor, filters: Filters, seen: Tensor | None, space: LimitSpace) -> None:
    """Find the limit of each row by top_k and top_p, after `survey`. What equals the last logit kept is kept too."""
    count, V = logits.shape
    pieces = space.tops.shape[1]
    with on(logits.device):
        limit_kernel[(count,)](
            logits,
            logits if seen is None else seen,
            space.tops,
            space.masses,
            space.chosen,
            space.limits,
            logits.stride(0),
            V,
            filters.penalty or 1.0,
            filters.temperature,
            float(filters.top_k or 0),
            filters.top_p or 1.0,
            REPEAT=filters.penalty is not None,
            TOP_K=filters.top_k is not None,
            TOP_P=filters.top_p is not None,
            LOW=_FREE_BITS[logits.dtype] if filters.penalty is None else 0,
            PIECES=pieces,
            PIECES_PAD=triton.next_power_of_2(pieces),
            READ=_READ,
            PIECE=_PIECE,
            num_warps=16,
            **options(logits.device, logits.dtype),
        )
