"""Tile sizes: the shipped choice, the choice by measurement, and what is kept on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hqq.core.bitpack import FORMATS
from hqq.core.grouping import Grouping
from hqq.errors import ConfigError
from hqq.kernels.dequant_config import Config, candidates, check_config, config_of_block, default_config
from hqq.kernels.dequant_view import MatrixView, view_of
from hqq.kernels.tune_cache import TuneCache, cache_folder


def view(
    packing: str, shape: tuple[int, ...], group_size: int | None, axis: int, widest: int = 1024
) -> MatrixView:
    return view_of(Grouping(shape, group_size, axis), FORMATS[packing], widest)


def test_view_of_rows_is_cut_into_powers_of_two() -> None:
    assert view("4bit_u8", (64, 96), 48, 1) == MatrixView("rows", 128 * 3, 64 * 3, 16, 3, 64)
    assert view("3bit_32", (11, 64), 64, 1) == MatrixView("rows", 11, 2, 64, 1, 2)
    assert view("8bit_u8", (3, 4096), None, 1) == MatrixView("rows", 12, 12, 1024, 4, 3)
    assert view("8bit_u8", (9, 7), None, 1) == MatrixView("rows", 63, 63, 1, 7, 9)


def test_view_of_columns_keeps_its_width() -> None:
    assert view("1bit_u8", (64, 96), 64, 0) == MatrixView("columns", 64, 8, 96, 1, 96)


def test_every_offered_configuration_can_be_built() -> None:
    for axis in (0, 1):
        for packing in FORMATS:
            for shape in ((4096, 4096), (8192, 28672)):
                seen = view(packing, shape, 64, axis), FORMATS[packing].fields, 2
                offered = candidates(*seen)
                assert offered[0] == default_config(*seen)
                assert len(set(offered)) == len(offered) > 5
                assert all(check_config(config) == config for config in offered)


def test_stripes_hold_as_many_bytes_of_scales_whatever_their_type() -> None:
    large = view("4bit_u8", (8192, 28672), 64, 0), FORMATS["4bit_u8"].fields
    for out_itemsize, stat_bytes in ((2, 4), (2, 2), (2, 3), (4, 8), (4, 2)):
        config = default_config(*large, out_itemsize, stat_bytes)
        held = config.stripe * config.block * stat_bytes
        assert 0 <= 1792 * 1024 * 4 - held < config.block * stat_bytes


def test_block_size_gives_a_configuration() -> None:
    assert [config_of_block(size, 2) for size in (32, 512, 1024, 4096)] == [
        Config(32, 1, 1),
        Config(512, 2, 1),
        Config(1024, 4, 1),
        Config(4096, 8, 1),
    ]
    with pytest.raises(ConfigError, match="got block=96"):
        config_of_block(96, 2)


def test_the_fastest_configuration_wins_and_ties_go_to_the_first() -> None:
    from hqq.kernels.dequant_tune import fastest

    times = {Config(512, 2, 1): 3.0, Config(1024, 4, 1): 2.0, Config(2048, 8, 1): 2.0}
    assert fastest(list(times), times.__getitem__) == Config(1024, 4, 1)


def test_cache_keeps_choices_across_processes(tmp_path: Path) -> None:
    cache = TuneCache("dequantize", "NVIDIA H200 triton 3.6.0 hqq 1.0")
    assert cache.get("4bit") is None
    cache.put("4bit", (1024, 4, 1))
    other = TuneCache("dequantize", "NVIDIA H200 triton 3.6.0 hqq 1.0")
    other.put("2bit", (512, 2, 8))
    cache.put("1bit", (512, 2, 1))
    again = TuneCache("dequantize", "NVIDIA H200 triton 3.6.0 hqq 1.0")
    assert [again.get(key) for key in ("4bit", "2bit", "1bit")] == [(1024, 4, 1), (512, 2, 8), (512, 2, 1)]
    assert TuneCache("dequantize", "NVIDIA H200 triton 3.7.0 hqq 1.0").get("4bit") is None
    assert [path.name for path in cache_folder().iterdir()] == [
        "dequantize-NVIDIA-H200-triton-3.6.0-hqq-1.0.json"
    ]


@pytest.mark.parametrize("content", ["{", "[1]", '{"4bit": "fast"}', '{"4bit": [1.5]}', "\x00"])
def test_corrupt_cache_is_ignored_with_a_warning(content: str) -> None:
    cache = TuneCache("dequantize", "gpu")
    cache.path.parent.mkdir(parents=True, exist_ok=True)
    cache.path.write_text(content)
    with pytest.warns(
        RuntimeWarning, match="ignoring the tuned tile sizes in .*delete the file or tune again"
    ):
        assert cache.get("4bit") is None
    with pytest.warns(RuntimeWarning, match="ignoring"):
        cache.put("4bit", (1024, 4, 1))
    assert json.loads(cache.path.read_text()) == {"4bit": [1024, 4, 1]}


def test_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HQQ_CACHE_DIR", str(tmp_path / "file"))
    cache = TuneCache("dequantize", "gpu")
    with pytest.warns(RuntimeWarning, match="could not keep tuned tile sizes|ignoring the tuned"):
        cache.put("4bit", (1024, 4, 1))
    assert cache.get("4bit") == (1024, 4, 1)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder().name.startswith("cache")
    monkeypatch.delenv("HQQ_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "hqq"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "hqq"


def test_importing_the_kernels_measures_nothing(tmp_path: Path) -> None:
    script = (
        "import triton.testing, hqq.kernels.dequant_op\n"
        "def refuse(*args, **kwargs): raise AssertionError('measured at import')\n"
        "triton.testing.do_bench = refuse\n"
        "import hqq.kernels.dequant_launch, hqq.kernels.dequant_tune"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
