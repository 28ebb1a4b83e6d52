"""Which tile sizes a dequantisation call runs with: tuned ones where they are known, else the shipped choice."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import triton
from torch import Tensor

import hqq
from hqq.core.qtensor import QSpec
from hqq.errors import ConfigError
from hqq.kernels.dequant_config import Config, candidates, check_config, default_config
from hqq.kernels.dequant_launch import launch, matrix_view
from hqq.kernels.dequant_plan import Stat
from hqq.kernels.dequant_view import MatrixView
from hqq.kernels.tune_cache import TuneCache

_WARM_UP_MS, _MEASURE_MS = 3, 15
_WIDEST = 1 << 16


def choose_config(
    W_q: Tensor,
    scale: Stat,
    zero: Stat,
    spec: QSpec,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    *,
    autotune: bool = False,
) -> Config:
    """Return the tile sizes for this call; `autotune` measures them if they are not known yet (not under capture)."""
    stat_bytes = scale.values.itemsize + zero.values.itemsize
    if W_q.device.type != "cuda":
        return _shipped(spec, out_dtype, stat_bytes)
    kept = _cache_of(torch.cuda.get_device_name(W_q.device))
    key = _key(scale, zero, spec, out_dtype)
    known = _valid(kept.get(key))
    if known is not None:
        return known
    if not autotune or torch.cuda.is_current_stream_capturing():
        return _shipped(spec, out_dtype, stat_bytes)

    def measure(config: Config) -> float:
        def run() -> Tensor:
            return launch(W_q, scale, zero, spec, dtype, out_dtype, config)

        with torch.cuda.device(W_q.device):
            # do_bench clears the L2 cache between runs.
            return float(triton.testing.do_bench(run, _WARM_UP_MS, _MEASURE_MS, return_mode="median"))

    best = fastest(candidates(_view(spec), _fields(spec), out_dtype.itemsize, stat_bytes), measure)
    kept.put(key, best)
    return best


def fastest(configs: list[Config], measure: Callable[[Config], float]) -> Config:
    """Return the configuration with the least measured time, the first one if several share it."""
    return min(configs, key=measure)


def forget() -> None:
    """Drop what was read from disk; the next call reads it again."""
    _cache_of.cache_clear()


@cache
def _cache_of(device_name: str) -> TuneCache:
    return TuneCache("dequantize", f"{device_name} triton {triton.__version__} hqq {hqq.__version__}")


def _key(scale: Stat, zero: Stat, spec: QSpec, out_dtype: torch.dtype) -> str:
    groups = spec.group_size if spec.channel_wise else "tensor"
    shape = "x".join(map(str, spec.shape))
    return (
        f"{spec.packing} axis{spec.axis} gs{groups} {out_dtype} scale:{scale.mode} zero:{zero.mode} {shape}"
    )


def _valid(choice: tuple[int, ...] | None) -> Config | None:
    """Return a kept choice as a configuration, or None for one that no kernel can be built from."""
    if choice is None or len(choice) != len(Config._fields):
        return None
    try:
        return check_config(Config(*choice))
    except ConfigError:
        return None


def _view(spec: QSpec) -> MatrixView:
    return matrix_view(spec, Config(_WIDEST, 1, 1))


def _fields(spec: QSpec) -> int:
    assert spec.format is not None
    return spec.format.fields


@cache
def _shipped(spec: QSpec, out_dtype: torch.dtype, stat_bytes: int) -> Config:
    return default_config(_view(spec), _fields(spec), out_dtype.itemsize, stat_bytes)
