"""Odd shapes through every fused kernel, small enough to run under a memory checker.

Run: compute-sanitizer --report-api-errors no --error-exitcode 1 --tool memcheck python -m benchmarks.matmul.memcheck
The same with --tool racecheck and --tool synccheck. Every product is compared with the exact one in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.matmul.gemm_explore import LIMIT, Case, oracle, random_qtensor
from hqq.kernels import TiledWeight, tiled_dequantize
from hqq.kernels.device import multiprocessors
from hqq.kernels.tiled_gemm import tiled_gemm
from hqq.kernels.tiled_gemv import Norm, launch_gemv
from hqq.kernels.tiled_gemv_config import GemvWork, candidates, choose_gemv

_BF16, _FP16 = torch.bfloat16, torch.float16
_EPS = 1e-5

# Whole blocks and ragged edges, several groups to a block of inputs and one for a row, both axes.
_CASES = (
    Case(1, 288, 512, 4, 1, 64, _BF16),
    Case(2, 528, 448, 2, 1, 16, _FP16),
    Case(3, 544, 336, 8, 1, None, _BF16),
    Case(5, 192, 320, 3, 0, 64, _FP16),
    Case(7, 80, 192, 1, 1, 32, _BF16),
    Case(1, 256, 1040, 1, 0, 128, _FP16),
    Case(16, 144, 80, 3, 1, 16, _BF16),
    Case(21, 128, 208, 4, 0, None, _FP16),
    Case(40, 256, 256, 8, 0, 128, _BF16),
    Case(100, 272, 512, 1, 1, 128, _FP16),
    Case(300, 528, 448, 4, 1, 64, _BF16),
)


def results(case: Case) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the name, the result and what it should be for every kernel that takes `case`."""
    q = random_qtensor(case)
    weight = TiledWeight.from_qtensor(q, case.dtype)
    shape = (weight.bits, case.axis, weight.group_size, case.N, case.K)
    tensors = (weight.codes, weight.meta, weight.rows)
    x, bias, scales, residual = (
        torch.randn(*size, dtype=case.dtype, device="cuda")
        for size in ((case.M, case.K), (case.N,), (case.K,), (case.M, case.N))
    )
    expected = oracle(q, x, bias)
    yield "dequantised", tiled_dequantize(weight), q.dequantize(case.dtype)
    out = torch.full_like(residual, torch.nan)
    tiled_gemm(x, *tensors, *shape, bias, out)
    yield "gemm", out, expected
    work = GemvWork(case.dtype, *shape, case.M)
    for config in candidates(work, multiprocessors(x.device.index))[::5]:
        out = torch.full_like(residual, torch.nan)
        launch_gemv(work, config, x, *tensors, bias, out, None, residual)
        yield f"gemv {tuple(config)}", out, expected + residual.double()
    work = work._replace(normed=True, gated=case.axis == 1 and case.N % 32 == 0)
    v = x.double()
    normed = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + _EPS) * scales.double()
    expected = oracle(q, normed, bias)
    if work.gated:
        gate, other = expected.chunk(2, dim=-1)
        expected = F.silu(gate) * other
    out = torch.full_like(expected, torch.nan, dtype=case.dtype)
    config = choose_gemv(work, multiprocessors(x.device.index))
    launch_gemv(work, config, x, *tensors, bias, out, Norm(scales, _EPS), None)
    yield f"gemv with norm {tuple(config)}", out, expected


def main() -> None:
    worst = 0.0
    for case in _CASES:
        for name, got, expected in results(case):
            error = float((got.double() - expected.double()).norm() / expected.double().norm())
            if not error <= LIMIT[case.dtype]:
                raise RuntimeError(f"{case.name}, {name}: relative error {error:.1e}")
            worst = max(worst, error)
    print(f"{len(_CASES)} cases, relative errors up to {worst:.1e}")


if __name__ == "__main__":
    main()
