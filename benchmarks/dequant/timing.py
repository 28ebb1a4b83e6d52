"""Timing GPU work: medians of CUDA-graph replays over enough buffers that nothing comes from the L2 cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# The buffers of one replay together; several times any L2 cache of today.
_ROTATED_BYTES = 1 << 30
# Starting a graph and the events around it take some 10 µs; a replay of this many calls makes that negligible.
_CALLS = 24


def buffer_sets(bytes_per_call: int) -> int:
    """Return how many distinct buffers a replay goes through."""
    return max(2, min(24, -(-_ROTATED_BYTES // bytes_per_call)))


def microseconds(function: Callable[[T], Tensor], inputs: Sequence[T], replays: int = 15) -> float:
    """Return the median over replays of the time of one call; a replay goes through the inputs, as often as needed.

    Results stay alive within a replay, so that each call writes memory of its own.
    """
    graph, results = captured(function, inputs)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = _event(), _event()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(results))
    del results, graph
    return float(statistics.median(times))


def steady_microseconds(function: Callable[[T], Tensor], inputs: Sequence[T], replays: int = 15) -> float:
    """Return the median time of one call as `microseconds` does, from replays that follow each other without a pause.

    The GPU is still busy with one replay while the next is sent, so that what the host takes for it is not measured.
    """
    graph, results = captured(function, inputs)
    times = [time / len(results) for time in replay_microseconds(graph, replays, before=3)]
    del results, graph
    return float(statistics.median(times))


def replay_microseconds(graph: torch.cuda.CUDAGraph, replays: int, before: int) -> list[float]:
    """Return the times of replays without a pause between them, after `before` others."""
    events = [_event() for _ in range(replays + 1)]
    for _ in range(before):
        graph.replay()
    for event in events[:-1]:
        event.record()
        graph.replay()
    events[-1].record()
    events[-1].synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in pairwise(events)]


def captured(
    function: Callable[[T], Tensor], inputs: Sequence[T]
) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """Return a graph of calls that go through the inputs, and what it writes: one result for each call."""
    calls = [inputs[i % len(inputs)] for i in range(max(_CALLS, len(inputs)))]
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for item in inputs[:2]:
            function(item)  # compiles, and sets up what must not happen under capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = [function(item) for item in calls]
    return graph, results


def eager_microseconds(function: Callable[[T], Tensor], inputs: Sequence[T], repeats: int = 5) -> float:
    """Return the median time of one call without a graph, launch overhead included."""
    for item in inputs[:2]:
        function(item)
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start, end = _event(), _event()
        start.record()
        for item in inputs:
            function(item)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(inputs))
    return float(statistics.median(times))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def bandwidth() -> float:
    """Return what a large elementwise multiplication moves, read and written, in bytes per second."""
    inputs = [torch.rand(1 << 28, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    # A number, not a tensor: a factor in device memory takes torch's slower, general kernel.
    best = min(steady_microseconds(lambda x: x * 1.5, inputs) for _ in range(3))
    return 2 * inputs[0].nbytes / (best * 1e-6)
