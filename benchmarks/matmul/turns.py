"""Times of functions that take turns on a GPU, so that its clock, which follows power and heat, is the same for all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

# A function, and what it is called with: more memory than a cache holds.
Contender: TypeAlias = tuple[Callable[[Any], Tensor], Sequence[Any]]
_CALLS, _REPLAYS = 24, 4


def microseconds_in_turn(contenders: Sequence[Contender], rounds: int = 6) -> list[float]:
    """Return the median time of a call of each contender, from CUDA graphs replayed without a pause, in turn.

    In the first of the rounds, whose times do not count, the GPU comes to the clock that it keeps.
    """
    graphs = [_captured(*contender) for contender in contenders]
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(rounds + 1):
        for found, (graph, calls, _) in zip(times, graphs, strict=True):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(_REPLAYS + 1)]  # type: ignore[no-untyped-call]
            graph.replay()
            for event in events[:-1]:
                event.record()
                graph.replay()
            events[-1].record()
            events[-1].synchronize()
            found += [start.elapsed_time(end) * 1e3 / calls for start, end in pairwise(events)]
    return [statistics.median(found[_REPLAYS:]) for found in times]


def _captured(
    function: Callable[[Any], Tensor], inputs: Sequence[Any]
) -> tuple[torch.cuda.CUDAGraph, int, list[Tensor]]:
    """Return a graph of calls, their number, and what they write."""
    for item in inputs[:2]:
        function(item)  # compiles, and sets up what must not happen under capture
    torch.cuda.synchronize()
    calls = [inputs[i % len(inputs)] for i in range(max(_CALLS, len(inputs)))]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [function(item) for item in calls]
    return graph, len(calls), results
