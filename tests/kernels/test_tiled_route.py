"""Which kernel takes a product with a tiled weight, by its number of tokens."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch

from hqq.kernels.tiled_gemv_config import GemvWork
from hqq.kernels.tiled_op import _route

TOKENS = (*range(1, 65), *range(64, 4097, 64))


def routes(gemm: bool, axis: int, group_size: int, N: int, K: int) -> list[tuple[str, int]]:
    """Return the kernels in turn, as tokens grow, each with the most tokens that it takes."""
    work = GemvWork(torch.bfloat16, 4, axis, group_size, N, K, 1)
    found = [(_route(work._replace(tokens=M), gemm), M) for M in TOKENS]
    return [(name, [M for _, M in row][-1]) for name, row in groupby(found, key=lambda pair: pair[0])]


@pytest.mark.parametrize("shape", [(4096, 4096), (28672, 4096), (4096, 14336), (48, 80)])
@pytest.mark.parametrize("group_size", [16, 32, 64, 4096])
@pytest.mark.parametrize("axis", [0, 1])
def test_each_kernel_has_one_range(axis: int, group_size: int, shape: tuple[int, int]) -> None:
    with_gemm, without = (routes(gemm, axis, group_size, *shape) for gemm in (True, False))
    assert [name for name, _ in with_gemm] == ["gemv", "gemm", "dequantize"]
    assert [name for name, _ in without] == ["gemv", "dequantize"]
    assert 1 < with_gemm[0][1] <= without[0][1] < with_gemm[1][1]


def test_limits() -> None:
    assert routes(True, 1, 64, 28672, 4096) == [("gemv", 8), ("gemm", 3072), ("dequantize", 4096)]
    assert routes(True, 0, 64, 28672, 4096) == [("gemv", 4), ("gemm", 512), ("dequantize", 4096)]
    assert routes(True, 1, 64, 4096, 4096) == [("gemv", 8), ("gemm", 1024), ("dequantize", 4096)]


def test_rows_that_are_no_multiple_of_what_kernels_load_are_dequantised() -> None:
    assert {name for name, _ in routes(True, 1, 24, 64, 72)} == {"dequantize"}
