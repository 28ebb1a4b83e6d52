"""Measured configurations: the fastest is kept on disk, and used from then on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hqq.core.qtensor import QSpec
from hqq.kernels import tiled_tune
from hqq.kernels.tiled_gemv_config import GemvConfig, GemvWork, candidates, choose_gemv
from hqq.kernels.tune_cache import TuneCache

SPEC = QSpec(4, (256, 1024), 64, 1, "4bit_u8")
WORK = GemvWork(torch.bfloat16, 4, 1, 64, 256, 1024, 2)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[GemvConfig]:
    """Replace the clock by one for which the last configuration is the fastest; return what was measured."""
    seen: list[GemvConfig] = []

    def microseconds(launch: object, copies: object) -> float:
        seen.append(launch.args[1])  # type: ignore[attr-defined]
        return 100.0 - len(seen)

    monkeypatch.setenv("HQQ_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiled_tune, "_microseconds", microseconds)
    monkeypatch.setattr(tiled_tune, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(tiled_tune, "_cache", lambda device: TuneCache("gemv", "a GPU of the tests"))
    tiled_tune._config.cache_clear()
    return seen


def test_the_fastest_is_kept(measured: list[GemvConfig]) -> None:
    device = torch.device("cpu")
    assert tiled_tune.gemv_config(WORK, device) == choose_gemv(WORK, 132)
    weight = tiled_tune.random_weight(SPEC, torch.bfloat16, device)
    reported: dict[GemvConfig, float] = {}
    best = tiled_tune.tune(weight, 2, reported.__setitem__)
    assert measured == 2 * candidates(WORK, 132)
    assert best == measured[-1] == min(reported, key=lambda config: reported[config])
    assert tiled_tune.gemv_config(WORK, device) == best
    # Another process, and other numbers of tokens that the same kernel takes.
    tiled_tune._config.cache_clear()
    assert tiled_tune.gemv_config(WORK, device) == best
    assert tiled_tune.gemv_config(WORK._replace(tokens=8), device) == choose_gemv(
        WORK._replace(tokens=8), 132
    )


def test_random_weight() -> None:
    weight = tiled_tune.random_weight(SPEC, torch.float16, torch.device("cpu"))
    q = weight.to_qtensor()
    assert q.codes().unique().numel() == 16
    assert q.check().spec == SPEC
