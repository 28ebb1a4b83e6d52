"""Check and time tiles -> matrix on one GPU: python -m benchmarks.matmul.tile_dequant."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from benchmarks.dequant.timing import bandwidth, steady_microseconds
from benchmarks.harness import table
from benchmarks.matmul.gemm_explore import Arguments, Case, arguments, random_qtensor
from hqq.kernels import tile_dequant
from hqq.kernels.cuda.nvrtc import cubin
from hqq.kernels.tile_dequant import tile_dequantize
from hqq.kernels.tiled_weight import TiledWeight

H, B = torch.float16, torch.bfloat16
CHECKS = [
    Case(0, N, K, bits, axis, size, dtype)
    for bits in (8, 4, 3, 2, 1)
    for axis, N, K, size in (
        (1, 560, 576, 64),
        (1, 100, 192, 16),
        (1, 72, 100, None),
        (0, 96, 100, 32),
        (0, 512, 320, 64),
    )
    for dtype in (H, B)
]
TIMES = [
    Case(0, N, K, bits, axis)
    for N, K in ((8192, 28672), (4096, 4096))
    for bits in (8, 4, 3, 2, 1)
    for axis in (1, 0)
]


def compile_all() -> None:
    """Compile what the cases need, several at a time."""
    kernels = []
    for case in CHECKS + TIMES:
        group = 0 if case.axis == 1 and case.group_size is None else case.group_size or case.N
        run = tile_dequant._run(case.bits, case.axis, 2 * case.N * case.K)
        dtype = "F16" if case.dtype == H else "BF16"
        kernels.append(tile_dequant._kernel(dtype, case.bits, case.axis, group, run, case.K % 8 != 0))
    with ThreadPoolExecutor(16) as pool:
        list(
            pool.map(
                lambda pair: cubin(pair[0], pair[1], "sm_90a"), {(k.source, k.defines): None for k in kernels}
            )
        )


def main() -> None:
    """Check against the reference, then time."""
    compile_all()
    wrong = 0
    for case in CHECKS:
        q = random_qtensor(case)
        weight = TiledWeight.from_qtensor(q, case.dtype)
        guard = torch.full((case.N + 2, case.K), float("nan"), dtype=case.dtype, device="cuda")
        tile_dequantize(*arguments(weight), out=guard[1:-1])
        same = torch.equal(guard[1:-1], q.dequantize(case.dtype))
        if not (same and guard[0].isnan().all() and guard[-1].isnan().all()):
            wrong += 1
            bad = (guard[1:-1] != q.dequantize(case.dtype)).float().mean()
            print("WRONG", case.name, f"{float(bad):.3f} of the elements differ", flush=True)
    print(f"{len(CHECKS)} checks, {wrong} wrong", flush=True)
    rate = bandwidth()
    rows = []
    for case in TIMES:
        weight = TiledWeight.from_qtensor(random_qtensor(case), case.dtype)
        args = arguments(weight)
        copies = min(24, max(2, (1 << 30) // (weight.nbytes + 2 * case.N * case.K)))
        buffers = [(weight.codes.clone(), weight.meta.clone()) for _ in range(copies)]

        def run(pair: tuple[Tensor, Tensor], args: Arguments = args) -> Tensor:
            return tile_dequantize(*pair, args[2], *args[3:])

        time = steady_microseconds(run, buffers)
        floor = (weight.nbytes + 2 * case.N * case.K) / rate * 1e6
        rows.append(
            {
                "shape": f"{case.N}x{case.K}",
                "bits": case.bits,
                "axis": case.axis,
                "us": round(time, 1),
                "floor": round(floor, 1),
            }
        )
    print(f"{rate / 1e12:.2f} TB/s")
    print(table(rows))


if __name__ == "__main__":
    main()
