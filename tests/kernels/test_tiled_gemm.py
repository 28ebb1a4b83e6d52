"""The fused GEMM and the way from tiles back to a matrix: the kernels' own sources on the host, on small shapes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hqq.kernels import tile_dequant, tiled_gemm
from hqq.kernels.tile_layout import chunk_blocks
from hqq.kernels.tiled_gemm_config import GemmConfig, choose, fitted
from hqq.kernels.tiled_weight import TiledWeight
from tests.kernels.cuda_on_host.host_kernel import HostKernel, compiler
from tests.kernels.cuda_on_host.launchers import kernels_on_host
from tests.kernels.tiled import LIMIT, exact, random_qtensor

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")

FP16, BF16 = torch.float16, torch.bfloat16


class Case(NamedTuple):
    bits: int
    axis: int
    group_size: int | None
    N: int
    K: int
    M: int
    dtype: torch.dtype
    config: GemmConfig
    multiprocessors: int = 3


CASES = {
    "8 bit, groups of 192": Case(8, 1, 192, 256, 384, 17, FP16, GemmConfig(32, depth=2, joint=2)),
    "8 bit, axis 0": Case(8, 0, 32, 96, 128, 20, BF16, GemmConfig(32, depth=2, stages=2)),
    "4 bit, tiles of 32 features": Case(4, 1, 64, 512, 512, 70, BF16, GemmConfig(64, 2, 2, 3, 2, 3, 2)),
    "4 bit, axis 0, cluster": Case(4, 0, 64, 1024, 256, 40, BF16, GemmConfig(64, 1, 2, 2, stages=2, split=2)),
    "4 bit, ragged N": Case(4, 1, 16, 100, 192, 20, FP16, GemmConfig(32, 1, 2, 3, stages=2)),
    "3 bit, axis 0, odd R": Case(3, 0, 32, 96, 100, 20, FP16, GemmConfig(16, depth=2, stages=2), 2),
    "3 bit, several groups in a block": Case(3, 1, 16, 128, 512, 20, BF16, GemmConfig(32, depth=2, stages=2)),
    "2 bit, whole rows, odd K": Case(2, 1, None, 72, 101, 5, BF16, GemmConfig(16, 1, 2, 2, stages=2), 2),
    "1 bit, axis 0, two blocks of tokens": Case(
        1, 0, 64, 512, 512, 33, FP16, GemmConfig(32, depth=2, split=2, steps=1)
    ),
}


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    with kernels_on_host(tiled_gemm), kernels_on_host(tile_dequant):
        yield monkeypatch


def arguments(weight: TiledWeight) -> tuple[Tensor, Tensor, Tensor, int, int, int, int, int]:
    N, K = weight.spec.shape
    return (weight.codes, weight.meta, weight.rows, weight.bits, weight.spec.axis, weight.group_size, N, K)


def product(weight: TiledWeight, x: Tensor, bias: Tensor | None, config: GemmConfig) -> Tensor:
    N = weight.spec.shape[0]
    guard = torch.full((x.shape[0] + 2, N), float("nan"), dtype=x.dtype)
    tiled_gemm.tiled_gemm(x, *arguments(weight), bias, guard[1:-1], config)
    assert guard[0].isnan().all()
    assert guard[-1].isnan().all()
    return guard[1:-1].double()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@needs_compiler
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_product_agrees_with_fp64_and_repeats(case: Case, on_host: pytest.MonkeyPatch) -> None:
    on_host.setattr(tiled_gemm, "multiprocessors", lambda device: case.multiprocessors)
    q = random_qtensor(case.bits, case.N, case.K, case.axis, case.group_size, case.dtype)
    weight = TiledWeight.from_qtensor(q, case.dtype)
    x, bias = torch.randn(case.M, case.K).to(case.dtype), torch.randn(case.N).to(case.dtype)
    found = product(weight, x, bias, case.config)
    assert relative_error(found, x.double() @ exact(q).T + bias.double()) <= LIMIT[case.dtype]
    # Another order of threads and blocks.
    on_host.setattr(tiled_gemm, "Kernel", partial(HostKernel, seed=1))
    tiled_gemm._kernels.cache_clear()
    assert torch.equal(found, product(weight, x, bias, case.config))


@needs_compiler
@pytest.mark.parametrize("axis", [0, 1])
def test_joined_weights(axis: int, on_host: pytest.MonkeyPatch) -> None:
    # Scales of very different size: along axis 0 each part is kept with another power of two.
    on_host.setattr(tiled_gemm, "multiprocessors", lambda device: 3)
    parts = [random_qtensor(4, N, 128, axis, 16, FP16) for N in (160, 48)]
    assert isinstance(parts[1].scale, Tensor)
    parts[1].scale /= 64
    weight = TiledWeight.cat([TiledWeight.from_qtensor(q, FP16) for q in parts])
    x = torch.randn(20, 128).half()
    found = product(weight, x, None, GemmConfig(32, 1, 2, 2, stages=2))
    for result, q in zip((found[:, :160], found[:, 160:]), parts, strict=True):
        assert relative_error(result, x.double() @ exact(q).T) <= LIMIT[FP16]


@needs_compiler
@pytest.mark.parametrize("power", [-60, 60])
def test_size_of_scales_costs_no_bits(power: int, on_host: pytest.MonkeyPatch) -> None:
    """In bfloat16 codes pass through subnormal numbers: a power of two in the scales is one in the results."""
    on_host.setattr(tiled_gemm, "multiprocessors", lambda device: 3)
    q = random_qtensor(8, 96, 128, 0, 32, BF16)
    x = torch.randn(20, 128).bfloat16()
    config = CASES["8 bit, axis 0"].config
    found = product(TiledWeight.from_qtensor(q, BF16), x, None, config)
    assert isinstance(q.scale, Tensor)
    q.scale *= 2.0**power
    assert torch.equal(product(TiledWeight.from_qtensor(q, BF16), x, None, config), found * 2.0**power)


SHAPES = {
    8: (1, 100, 192, 16),
    4: (0, 128, 320, 64),
    3: (0, 96, 100, 32),
    2: (1, 72, 101, None),
    1: (1, 112, 192, 64),
}


@needs_compiler
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("bits", SHAPES)
def test_dequantised_tiles_equal_the_reference(
    bits: int, dtype: torch.dtype, on_host: pytest.MonkeyPatch
) -> None:
    axis, N, K, group_size = SHAPES[bits]
    q = random_qtensor(bits, N, K, axis, group_size, dtype)
    guard = torch.full((N + 2, K), float("nan"), dtype=dtype)
    weight = TiledWeight.from_qtensor(q, dtype)
    tile_dequant.tile_dequantize(*arguments(weight), out=guard[1:-1])
    assert torch.equal(guard[1:-1], q.dequantize(dtype))
    assert guard[0].isnan().all()
    assert guard[-1].isnan().all()


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("group", [0, 16, 64])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("M", [1, 17, 33, 65, 96, 129, 200, 320, 512, 1024])
@pytest.mark.parametrize("N", [2048, 4096, 6144, 28672])
def test_chosen_settings_fit_a_multiprocessor(N: int, M: int, axis: int, group: int, bits: int) -> None:
    config = fitted(choose(M, N, 4096, bits, 132), bits, axis, max(group, 16 * (1 - axis)), 4096)
    assert config.fits(bits, axis, group)
    assert config.span % config.joint == 0
    assert config.span % chunk_blocks(bits) == 0
    assert config.span * config.blocks % 2 == 0
    # No more columns than needed, rounded up to the next size.
    assert config.tokens < 2 * max(M, 32)


@pytest.mark.parametrize(
    ("M", "N", "K", "tokens", "split"),
    [
        (128, 4096, 4096, 64, 2),  # two times 32 tiles, twice
        (128, 4096, 14336, 128, 0),
        (256, 4096, 14336, 128, 2),
        (512, 4096, 4096, 128, 1),
        (128, 6144, 4096, 128, 2),
        (256, 6144, 4096, 128, 0),  # 48 tiles: neither once nor twice as many fill 132 multiprocessors
        (256, 28672, 4096, 256, 0),
    ],
)
def test_one_round_of_blocks_where_it_fills_the_gpu(M: int, N: int, K: int, tokens: int, split: int) -> None:
    config = choose(M, N, K, 4, 132)
    assert (config.tokens, config.split) == (tokens, split)
