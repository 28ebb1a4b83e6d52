"""Which configuration of the kernel for few tokens a product gets: measured here before, or chosen by shape."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Tensor

import hqq
from hqq.core.bitpack import pack
from hqq.core.qtensor import QSpec, QTensor
from hqq.kernels.device import multiprocessors
from hqq.kernels.tiled_gemv import launch_gemv
from hqq.kernels.tiled_gemv_config import GemvConfig, GemvWork, candidates, choose_gemv, columns
from hqq.kernels.tiled_weight import TiledWeight
from hqq.kernels.tune_cache import TuneCache

# So that weights come from memory, not from the cache of a GPU.
_ROTATED_BYTES = 256 << 20
_REPLAYS = 9
_ROUNDS = 2  # what is measured first after a pause can come out a tenth slower


def work_with(weight: TiledWeight, tokens: int) -> GemvWork:
    """Return what a product of so many tokens with `weight` is."""
    N, K = weight.spec.shape
    return GemvWork(weight.dtype, weight.bits, weight.spec.axis, weight.group_size, N, K, tokens)


def gemv_config(work: GemvWork, device: torch.device) -> GemvConfig:
    """Return the measured configuration for `work` on `device` if `tune` has kept one, else the chosen one.

    What is measured for a product serves it with a norm as well, and with a gate if it takes two row tiles at a time.
    """
    return _config(work._replace(tokens=columns(work.tokens), normed=False), device.index or 0)


@cache
def _config(work: GemvWork, device: int) -> GemvConfig:
    kept = _cache(device).get(_key(work._replace(gated=False)))
    if kept is not None and len(kept) == len(GemvConfig._fields):
        config = GemvConfig(*kept)
        if config.tiles == 2 or not work.gated:
            return config
    return choose_gemv(work, multiprocessors(device))


@cache
def _cache(device: int) -> TuneCache:
    name = torch.cuda.get_device_name(device)
    return TuneCache("gemv", f"{name} CUDA {torch.version.cuda} hqq {hqq.__version__}")


def _key(work: GemvWork) -> str:
    return ",".join(str(value).removeprefix("torch.") for value in work)


def random_qtensor(spec: QSpec, dtype: torch.dtype, device: torch.device) -> QTensor:
    """Return random codes, scales and zeros for `spec`."""
    assert spec.format is not None
    codes = torch.randint(0, spec.max_code + 1, spec.grouping.matrix_shape, dtype=torch.uint8, device=device)
    stat = spec.grouping.stat_shape
    scale = (0.002 + 0.01 * torch.rand(stat, device=device)).to(dtype)
    zero = (torch.rand(stat, device=device) * spec.max_code).to(dtype)
    return QTensor(pack(codes, spec.format), scale, zero, spec)


def random_weight(spec: QSpec, dtype: torch.dtype, device: torch.device) -> TiledWeight:
    """Return a weight of `spec` with random codes, scales and zeros."""
    return TiledWeight.from_qtensor(random_qtensor(spec, dtype, device), dtype)


def tune(
    weight: TiledWeight, tokens: int, report: Callable[[GemvConfig, float], None] | None = None
) -> GemvConfig:
    """Measure the configurations for `tokens` tokens with `weight`, keep the fastest on disk and return it.

    `report` is called with each configuration and its microseconds. The weight is on a CUDA device.
    """
    work = work_with(weight, columns(tokens))
    device = weight.device.index
    copies = [weight.codes]
    while len(copies) * weight.codes.nbytes < _ROTATED_BYTES:
        copies.append(weight.codes.clone())
    x = torch.randn(work.tokens, work.K, device=weight.device).to(weight.dtype)
    out = x.new_empty((work.tokens, work.N))
    times = dict.fromkeys(candidates(work, multiprocessors(device)), math.inf)
    for _ in range(_ROUNDS):
        for config in times:
            microseconds = _microseconds(partial(_launch, work, config, x, weight, out), copies)
            times[config] = min(times[config], microseconds)
    for config, microseconds in times.items():
        if report is not None:
            report(config, microseconds)
    best = min(times, key=lambda config: times[config])
    _cache(device).put(_key(work), best)
    _config.cache_clear()
    return best


def _launch(
    work: GemvWork, config: GemvConfig, x: Tensor, weight: TiledWeight, out: Tensor, codes: Tensor
) -> None:
    launch_gemv(work, config, x, codes, weight.meta, weight.rows, None, out)


def _microseconds(launch: Callable[[Tensor], None], copies: list[Tensor]) -> float:
    """Return the median time of a launch in replays of a CUDA graph that takes the copies in turn."""
    # The stream that torch would capture on stays the first device's.
    with torch.cuda.device(copies[0].device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # and on its device
        for codes in copies:
            launch(codes)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for codes in copies:
                launch(codes)
        # Replays follow each other without a pause, so that what the host takes to send them is not measured.
        events = [torch.cuda.Event(enable_timing=True) for _ in range(_REPLAYS + 2)]  # type: ignore[no-untyped-call]
        for event in events:
            event.record()
            graph.replay()
        torch.cuda.synchronize()
    times: list[float] = [start.elapsed_time(end) * 1000 / len(copies) for start, end in pairwise(events[1:])]
    return statistics.median(times)
