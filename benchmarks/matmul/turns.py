"""Times of functions that take turns on a GPU, so that its clock, which follows power and heat, is the same for all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from benchmarks.dequant.timing import captured, replay_microseconds

# A function, and what it is called with: more memory than a cache holds.
Contender: TypeAlias = tuple[Callable[[Any], Tensor], Sequence[Any]]
_REPLAYS = 4


def microseconds_in_turn(contenders: Sequence[Contender], rounds: int = 6) -> list[float]:
    """Return the median time of a call of each contender, from CUDA graphs replayed without a pause, in turn.

    In the first of the rounds, whose times do not count, the GPU comes to the clock that it keeps.
    """
    graphs = [captured(*contender) for contender in contenders]
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(rounds + 1):
        for found, (graph, results) in zip(times, graphs, strict=True):
            found += [time / len(results) for time in replay_microseconds(graph, _REPLAYS, before=1)]
    return [statistics.median(found[_REPLAYS:]) for found in times]
