"""Which configurations of the dequantisation kernel are fastest: the measurement behind the shipped choice.

Run: python -m benchmarks.dequant.explore --out FOLDER [--bits 8,4,3,2,1] [--axes 1,0] [--shapes 8192x28672,4096x4096]
Writes FOLDER/dequant_explore.json and prints, for each case, the fastest configurations and the shipped one. Names are
block/warps/steps and, after a letter each, stripe, burst@distance, phase, streaming, overlap (see `Config`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.dequant.tensors import moved_bytes, random_qtensor
from benchmarks.dequant.timing import bandwidth, buffer_sets, microseconds
from benchmarks.dequant.warm import warm
from benchmarks.harness import record, table, write_json
from hqq.core.qtensor import QTensor
from hqq.kernels.dequant_config import Config, default_config
from hqq.kernels.dequant_launch import launch, matrix_view
from hqq.kernels.dequant_plan import inline_stat

Shape = tuple[int, int]
_DTYPE = torch.bfloat16
_LARGE_RESULT = 1 << 26  # elements
_SHOWN = 4


def name_of(config: Config) -> str:
    """Return the short name of `config`, without what is off."""
    name = f"{config.block}/{config.warps}/{config.steps}"
    name += f" s{config.stripe}" if config.stripe else ""
    name += f" p{config.burst}@{config.distance}" if config.burst else ""
    name += f" P{config.phase}" if config.phase else ""
    return name + (" cs" if config.streaming else "") + f" o{config.overlap}"


def configurations(shape: Shape, axis: int) -> list[Config]:
    """Return what is tried for one shape and axis."""
    large = shape[0] * shape[1] >= _LARGE_RESULT
    found = _small(axis) if not large else _rows() if axis == 1 else _columns()
    return list(dict.fromkeys(found))


def _small(axis: int) -> Iterator[Config]:
    tiles = ((1024, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 8))
    for (block, warps), steps in product(tiles, (1, 2) if axis == 1 else (1, 2, 3, 4)):
        for overlap in (2, 4):
            yield Config(block, warps, steps, overlap=overlap)
    for overlap in (0, 1, 3):
        yield Config(2048, 4, 1, overlap=overlap)
    for overlap in (1, 4):
        yield Config(2048, 4, 1, streaming=1, overlap=overlap)


def _rows() -> Iterator[Config]:
    for burst, distance in product((4, 8, 16), (1024, 2048, 3072)):
        yield Config(1024, 4, 1, 0, burst, distance, 1)
    for block, warps, steps in ((2048, 4, 1), (2048, 8, 1), (1024, 4, 2)):
        for burst, distance in ((0, 0), (8, 1024), (16, 1024)):
            yield Config(block, warps, steps, 0, burst, distance, 1)
    for block, warps, burst, phase in (
        (1024, 4, 8, 2048),
        (1024, 4, 4, 1584),
        (1024, 4, 8, 4096),
        (2048, 8, 4, 1024),
    ):
        yield Config(block, warps, 1, 0, burst, phase, 1, phase=phase)
    for streaming, overlap in ((1, 1), (1, 0), (0, 1)):
        yield Config(1024, 4, 1, streaming=streaming, overlap=overlap)


def _columns() -> Iterator[Config]:
    for stripe, steps, (burst, distance) in product((896, 1792, 3584), (1, 2, 4), ((0, 0), (16, 2048))):
        yield Config(1024, 4, steps, stripe, burst, distance if steps == 1 else 1024, 1)
    for burst, distance in product((4, 8, 16), (1024, 2048, 3072)):
        yield Config(1024, 4, 1, 1792, burst, distance, 1)
    yield Config(1024, 4, 1, 1792, streaming=1, overlap=0)
    yield Config(2048, 8, 1, 896, 16, 1024, 1)
    yield Config(1024, 4, 1, 1792, 16, 1024, 1, phase=1024)
    yield Config(1024, 4, 4)


def run_one(q: QTensor, config: Config) -> Tensor:
    """Return `q` dequantised with `config`."""
    scale, zero = inline_stat(q.scale, _DTYPE), inline_stat(q.zero, _DTYPE)
    return launch(q.W_q, scale, zero, q.spec, _DTYPE, _DTYPE, config)


def compile_all(case: tuple[Shape, int, int]) -> None:
    """Put every kernel of one case into Triton's cache on disk."""
    shape, nbits, axis = case
    q = random_qtensor(nbits, shape, 64, axis, _DTYPE)
    for config in configurations(shape, axis):
        run_one(q, config)


def explore(shape: Shape, nbits: int, axis: int, peak: float) -> dict[str, Any]:
    """Return the times of every configuration for one case, fastest first."""
    first = random_qtensor(nbits, shape, 64, axis, _DTYPE)
    moved = moved_bytes(first, _DTYPE)
    inputs = [first, *(random_qtensor(nbits, shape, 64, axis, _DTYPE) for _ in range(buffer_sets(moved) - 1))]
    expected = first.dequantize()
    fmt = first.spec.format
    assert fmt is not None
    shipped = default_config(matrix_view(first.spec, Config(1 << 16, 1, 1)), fmt.fields, _DTYPE.itemsize)
    times = {}
    for config in dict.fromkeys([shipped, *configurations(shape, axis)]):
        assert torch.equal(run_one(first, config), expected), config
        times[name_of(config)] = round(microseconds(partial(run_one, config=config), inputs, 7), 3)
    return {
        "shape": shape,
        "bits": nbits,
        "axis": axis,
        "floor_us": round(moved / peak * 1e6, 2),
        "shipped": name_of(shipped),
        "us": dict(sorted(times.items(), key=lambda item: item[1])),
    }


def row(case: dict[str, Any]) -> dict[str, object]:
    """Return the line of the printed table for one case: times over the floor, or microseconds of short runs."""
    times, floor = case["us"], case["floor_us"]

    def shown(name: str) -> str:
        return f"{name} = {times[name] / floor:.3f}" + (f" ({times[name]:.2f} us)" if floor < 30 else "")

    return {
        "case": f"{case['shape'][0]} {case['bits']}b ax{case['axis']}",
        "floor": floor,
        "best": "; ".join(shown(name) for name in list(times)[:_SHOWN]),
        "shipped": shown(case["shipped"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", default="4,1,8,3,2")
    parser.add_argument("--axes", default="1,0")
    parser.add_argument("--shapes", default="8192x28672,4096x4096")
    parser.add_argument("--seconds", type=float, default=400, help="start no further case after this long")
    parser.add_argument("--workers", type=int, default=14, help="processes that compile beforehand")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    bits, axes = (list(map(int, text.split(","))) for text in (arguments.bits, arguments.axes))
    shapes = [(int(n), int(k)) for n, k in (text.split("x") for text in arguments.shapes.split(","))]
    todo = [(shape, nbits, axis) for nbits in bits for axis in axes for shape in shapes]
    # 3 and 1 bit take longest to compile.
    warm(compile_all, sorted(todo, key=lambda case: case[1] not in (3, 1)), arguments.workers)
    print(f"compiled, {deadline - time.monotonic():.0f} s left", flush=True)
    peak = bandwidth()
    print(f"bandwidth {peak / 1e12:.3f} TB/s", flush=True)
    cases: list[dict[str, Any]] = []
    for case in todo:
        if time.monotonic() > deadline:
            print(f"left out for time: {case}")
            continue
        cases.append(explore(*case, peak))
        print(row(cases[-1]), flush=True)
        write_json(arguments.out / "dequant_explore.json", record(cases, bandwidth_bytes_per_s=peak))
        torch.cuda.empty_cache()
    print(table([row(case) for case in cases]))


if __name__ == "__main__":
    main()
