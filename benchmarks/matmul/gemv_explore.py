"""Try settings of the kernel for few tokens on one GPU: python -m benchmarks.matmul.gemv_explore --out FOLDER.

Each setting is compared with the exact product on fresh random values and poisoned results, run twice, and timed by
CUDA-graph replays over enough weights that nothing comes from the L2 cache.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.dequant.timing import bandwidth, buffer_sets, steady_microseconds
from benchmarks.harness import record, table, write_json
from benchmarks.matmul.gemm_explore import Case, oracle, random_qtensor
from hqq.kernels import TiledWeight
from hqq.kernels.device import multiprocessors
from hqq.kernels.tiled_gemv import kernel, launch_gemv
from hqq.kernels.tiled_gemv_config import GemvConfig, GemvWork, candidates
from hqq.kernels.tiled_tune import random_weight

_COMPILERS = 16
_ROUNDS = 2


def cases() -> Iterator[Case]:
    """Yield the products to try."""
    for N, K in ((28672, 4096), (4096, 4096), (4096, 14336)):
        for bits in (4, 2, 1, 3, 8):
            for axis in (1, 0):
                yield Case(1, N, K, bits, axis)
    for M in (2, 4, 8):
        for N, K in ((28672, 4096), (4096, 4096), (4096, 14336)):
            for axis in (1, 0):
                yield Case(M, N, K, 4, axis)
    for axis in (1, 0):
        yield Case(1, 14336, 4096, 4, axis)
        yield Case(1, 6144, 4096, 4, axis)


def work_of(case: Case) -> GemvWork:
    """Return what configurations depend on."""
    size = case.group_size or (case.K if case.axis == 1 else case.N)
    return GemvWork(case.dtype, case.bits, case.axis, size, case.N, case.K, case.M)


def product(
    work: GemvWork, config: GemvConfig, x: Tensor, weight: TiledWeight, bias: Tensor | None
) -> Tensor:
    """Return one product, in memory that held NaN."""
    out = torch.full((work.tokens, work.N), float("nan"), dtype=work.dtype, device="cuda")
    launch_gemv(work, config, x, weight.codes, weight.meta, weight.rows, bias, out)
    return out


def explore(case: Case, ceiling: float) -> Iterator[dict[str, Any]]:
    """Yield error, time and resources of every configuration that is worth trying."""
    work = work_of(case)
    configs = candidates(work, multiprocessors(0))
    variants = [kernel(work, config) for config in configs]
    with ThreadPoolExecutor(_COMPILERS) as pool:
        list(pool.map(lambda variant: variant.prepare(0), variants))
    q = random_qtensor(case)
    weight = TiledWeight.from_qtensor(q, case.dtype)
    x = torch.randn(case.M, case.K, device="cuda").to(case.dtype)
    bias = torch.randn(case.N, device="cuda").to(case.dtype)
    expected = oracle(q, x, bias)
    moved = weight.codes.nbytes + weight.meta.nbytes + 2 * case.M * (case.N + case.K)
    weights = [random_weight(case.spec, case.dtype, torch.device("cuda")) for _ in range(buffer_sets(moved))]
    out = torch.empty((case.M, case.N), dtype=case.dtype, device="cuda")
    errors: dict[GemvConfig, float] = {}
    for config in configs:
        y = product(work, config, x, weight, bias)
        if not torch.equal(y, product(work, config, x, weight, bias)):
            raise RuntimeError(f"{case.name} {config}: two runs differ")
        errors[config] = float((y.double() - expected).norm() / expected.norm())

    def call(w: TiledWeight, config: GemvConfig) -> Tensor:
        launch_gemv(work, config, x, w.codes, w.meta, w.rows, None, out)
        return out

    # What is timed first after a pause, or after other work, can come out a tenth slower.
    times = dict.fromkeys(configs, math.inf)
    for _ in range(_ROUNDS):
        for config in configs:
            times[config] = min(times[config], steady_microseconds(partial(call, config=config), weights))
    for config, variant in zip(configs, variants, strict=True):
        yield {
            **{key: value for key, value in case._asdict().items() if key != "dtype"},
            "dtype": str(case.dtype).removeprefix("torch."),
            "floor_us": round(moved / ceiling * 1e6, 2),
            "us": round(times[config], 2),
            "chosen": config == configs[0],
            "config": config._asdict(),
            "relative_error": errors[config],
            "registers": variant.resources(0).registers,
            "spilled_bytes": variant.resources(0).local_bytes,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for gemv_explore.json")
    args = parser.parse_args()
    ceiling = bandwidth()
    rows: list[dict[str, Any]] = []
    for case in cases():
        found = sorted(explore(case, ceiling), key=lambda row: row["us"])
        print(table([{**row, "config": tuple(row["config"].values())} for row in found[:6]]), flush=True)
        rows += found
        write_json(args.out / "gemv_explore.json", record(rows, bandwidth_bytes_per_second=ceiling))


if __name__ == "__main__":
    main()
