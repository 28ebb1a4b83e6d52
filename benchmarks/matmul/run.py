"""Fused products side by side with peers, in one run: python -m benchmarks.matmul.run --out FOLDER [--seconds N].

Peers: cuBLAS with the weight in 16 bits, torch's tinygemm (4 bit, axis 1, bf16), and gemlite where it is installed.
Each figure is the median of CUDA-graph replays over enough weights that nothing comes from the L2 cache; before it is
timed, a product is compared with the exact one on fresh random values.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.dequant.timing import bandwidth, buffer_sets, steady_microseconds
from benchmarks.harness import record, table, write_json
from benchmarks.matmul.gemm_explore import LIMIT, SHAPES, Case, oracle, random_qtensor
from hqq.backends import gemlite, torchao_int4
from hqq.kernels import TiledWeight, tiled_linear
from hqq.kernels.tiled_tune import random_weight

FEW = (1, 2, 4, 8, 16)
MANY = (32, 64, 128, 256, 512, 1024, 4096)
PEERS: dict[str, Any] = {"tinygemm": torchao_int4.MATMUL, "gemlite": gemlite.MATMUL}


def cases() -> Iterator[Case]:
    """Yield what the README and the targets speak of first, then the rest of the grid."""
    for N, K in SHAPES[:2]:
        for bits in (4, 8, 3, 2, 1):
            for axis in (1, 0):
                yield Case(1, N, K, bits, axis)
    for M in (*FEW[1:], *MANY):
        for bits in (4, 2, 8, 3, 1) if M <= 256 else (4,):
            for axis in (1, 0) if bits in (4, 2) else (1,):
                yield Case(M, *SHAPES[0], bits, axis)
    for N, K in SHAPES[1:]:
        for M in (1, 16, 64, 256, 4096):
            yield Case(M, N, K, 4, 1)
    for bits in (4, 8, 3, 2, 1):
        yield Case(1, *SHAPES[0], bits, 1, 64, torch.float16)
        yield Case(1, *SHAPES[0], bits, 1, 128)


def measure(case: Case, ceiling: float, peers: bool) -> dict[str, Any]:
    """Return microseconds of ours and of the peers that take the case, after a check."""
    check(case)
    first = random_weight(case.spec, case.dtype, torch.device("cuda"))
    moved = first.codes.nbytes + first.meta.nbytes + 2 * case.M * (case.N + case.K)
    weights = [first]
    weights += [
        random_weight(case.spec, case.dtype, torch.device("cuda")) for _ in range(buffer_sets(moved) - 1)
    ]
    x = torch.randn(case.M, case.K, dtype=case.dtype, device="cuda")
    row: dict[str, Any] = {
        **{key: value for key, value in case._asdict().items() if key != "dtype"},
        "dtype": str(case.dtype).removeprefix("torch."),
        "floor": round(moved / ceiling * 1e6, 2),
        "ours": round(steady_microseconds(lambda w: tiled_linear(x, w), weights), 2),
    }
    row["of_bandwidth"] = round(row["floor"] / row["ours"], 3)
    del weights, first
    if peers:
        row |= {name: round(time_of(), 2) for name, time_of in peers_of(case, x)}
    return row


def check(case: Case) -> None:
    """Raise unless a product of ours on fresh random values is the exact one, within the dtype's limit."""
    q = random_qtensor(case)
    x, bias = (torch.randn(*size, dtype=case.dtype, device="cuda") for size in ((case.M, case.K), (case.N,)))
    expected = oracle(q, x, bias)
    got = tiled_linear(x, TiledWeight.from_qtensor(q, case.dtype), bias)
    error = float((got.double() - expected).norm() / expected.norm())
    if not error <= LIMIT[case.dtype]:
        raise RuntimeError(f"{case.name}: relative error {error:.1e}")


def peers_of(case: Case, x: Tensor) -> Iterator[tuple[str, Callable[[], float]]]:
    """Yield the peers that take `case`: name, and a function that returns microseconds."""
    dense = [
        torch.randn(case.N, case.K, dtype=case.dtype, device="cuda")
        for _ in range(buffer_sets(2 * case.N * case.K))
    ]
    yield "cublas", partial(steady_microseconds, lambda W: F.linear(x, W), dense)
    del dense
    for name, backend in PEERS.items():
        takes = backend.available() or backend.supports(case.spec, case.dtype, x.device)
        # gemlite measures for seconds at every new size, and neither is made for many tokens.
        if takes is None and case.M in (1, 16, 64):
            prepared = [backend.prepare(random_qtensor(case), case.dtype) for _ in dense_sets(case)]
            yield name, partial(steady_microseconds, lambda weight: weight.multiply(x), prepared)


def dense_sets(case: Case) -> range:
    """Return as many numbers as there are weights of four bits or more in a replay."""
    return range(buffer_sets(case.N * case.K // 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for matmul.json")
    parser.add_argument("--seconds", type=float, default=300, help="start no further case after so long")
    parser.add_argument("--no-peers", action="store_true")
    args = parser.parse_args()
    started, ceiling = time.monotonic(), bandwidth()
    print(
        f"bandwidth {ceiling / 1e12:.2f} TB/s; gemlite: {gemlite.MATMUL.available() or 'there'}", flush=True
    )
    rows: list[dict[str, Any]] = []
    measure(next(cases()), ceiling, peers=False)  # what is timed first after a pause comes out slower
    for case in cases():
        if time.monotonic() - started > args.seconds:
            print(f"out of time before {case.name}")
            break
        rows.append(measure(case, ceiling, not args.no_peers))
        print(rows[-1], flush=True)
        write_json(args.out / "matmul.json", record(rows, bandwidth_bytes_per_second=ceiling))
    keys = list(dict.fromkeys(key for row in rows for key in row))
    print(table([{key: row.get(key, "") for key in keys} for row in rows]))


if __name__ == "__main__":
    main()
