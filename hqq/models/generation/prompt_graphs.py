"""Passes over prompts as CUDA graphs: with few tokens, asking for their kernels takes the host longer than they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hqq.models.generation.compiling import collection_paused

# Longer passes keep the GPU busy for longer than the host takes to ask for them.
MOST_TOKENS = 2048
_SHORTEST = 64

# Tokens [B, M], the places [B] of the rows' last tokens among all B * M, and whether rows are padded -> logits [B, V].
Pass = Callable[[Tensor, Tensor, bool], Tensor]


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    input_ids: Tensor
    last: Tensor
    logits: Tensor


class PromptGraphs:
    """Runs `work` for prompts of one batch size: as it is for the first of about a length, later as a graph for all.

    They are filled up on the right to the length of the graph. What comes behind a prompt changes nothing in it, and it
    fills places in the cache that are those of tokens to come.

    Args:
        work: reads nothing but its arguments and what stays in place.
        length: of the cache.
    """

    def __init__(self, work: Pass, length: int) -> None:
        self._work, self._length = work, length
        self._recorded: dict[tuple[int, bool], _Recorded | None] = {}
        self._pool: Any = None

    def __call__(self, input_ids: Tensor, padded: bool) -> Tensor:
        """Return the logits [B, V] after prompts [B, M] that are padded on the left, if at all; overwritten later."""
        rows, tokens = input_ids.shape
        device = input_ids.device
        places = min(_rounded(tokens), self._length)
        if not input_ids.is_cuda or rows * places > MOST_TOKENS:
            return self._work(input_ids, _last(rows, tokens, tokens, device), padded)
        kind, last = (places, padded), _last(rows, places, tokens, device)
        if kind not in self._recorded:
            # Filled up as well, so that the recording finds everything compiled, and gives the same bits.
            logits = self._work(F.pad(input_ids, (0, places - tokens)), last, padded)
            self._recorded[kind] = None
            return logits
        with torch.cuda.device(device):
            recorded = self._recorded[kind] or self._record(rows, places, padded, device)
            self._recorded[kind] = recorded
            recorded.input_ids[:, :tokens].copy_(input_ids)
            recorded.last.copy_(last)
            recorded.graph.replay()
        return recorded.logits

    def clear(self) -> None:
        """Forget which lengths there were, and what was recorded for them."""
        self._recorded.clear()
        self._pool = None

    def _record(self, rows: int, places: int, padded: bool, device: torch.device) -> _Recorded:
        input_ids = torch.zeros(rows, places, dtype=torch.int64, device=device)
        last = _last(rows, places, places, device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # They take turns, so that one's memory will do for all.
        with (
            collection_paused(),
            torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"),
        ):
            logits = self._work(input_ids, last, padded)
        return _Recorded(graph, input_ids, last, logits)


def _rounded(tokens: int) -> int:
    """Return a length that is at most an eighth longer, or the shortest that there are."""
    step = max(_SHORTEST, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


def _last(rows: int, places: int, tokens: int, device: torch.device) -> Tensor:
    return torch.arange(rows, device=device) * places + (tokens - 1)
