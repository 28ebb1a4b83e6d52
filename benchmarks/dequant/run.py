"""The table of dequantisation times: this library's kernel, the original's formula eager and compiled, the seed kernel.

Run: python -m benchmarks.dequant.run --out FOLDER [--peers] [--autotune]
Writes FOLDER/dequant.json and prints a table. Microseconds per call, medians of CUDA-graph replays over rotated
buffers (eager without a graph); the floor is the bytes of codes, scale, zero and result over the measured bandwidth.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.dequant.peers import compiled, in_adjacent_rows, seed_kernels, unpack_eagerly
from benchmarks.dequant.tensors import moved_bytes, random_qtensor
from benchmarks.dequant.timing import bandwidth, buffer_sets, eager_microseconds, microseconds
from benchmarks.harness import record, table, write_json
from hqq.core.qtensor import QTensor
from hqq.kernels import dequantize_qtensor

_SMALL, _LARGE = (4096, 4096), (8192, 28672)


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    shape: tuple[int, int]
    axis: int
    group_size: int
    nbits: int
    dtype: torch.dtype = torch.bfloat16
    quantised: bool = False

    def columns(self) -> dict[str, object]:
        """Return the settings under the names of the published table."""
        return {
            "shape": f"{self.shape[0]}x{self.shape[1]}",
            "axis": self.axis,
            "group_size": self.group_size,
            "nbits": self.nbits,
            "dtype": str(self.dtype).removeprefix("torch."),
            "quant_scale": self.quantised,
            "quant_zero": self.quantised,
        }


def cases() -> Iterator[Case]:
    """Yield every case: the usual group size everywhere, the other settings at 4 bit."""
    for shape in (_SMALL, _LARGE):
        for nbits in (8, 4, 3, 2, 1):
            for axis in (1, 0):
                yield Case(shape, axis, 64, nbits)
    for nbits in (4, 2):
        for axis in (1, 0):
            for group_size in (32, 64, 128):
                if group_size != 64:
                    yield Case(_LARGE, axis, group_size, nbits)
                yield Case(_LARGE, axis, group_size, nbits, quantised=True)
    for shape in (_SMALL, _LARGE):
        for axis in (1, 0):
            yield Case(shape, axis, 64, 4, torch.float16)
            yield Case(shape, axis, 64, 4, torch.float32)
    for axis in (1, 0):
        yield Case(_SMALL, axis, 64, 4, quantised=True)


def measure(case: Case, peak: float, peers: bool, autotune: bool) -> dict[str, Any]:
    """Return the line of `case`: settings and microseconds."""
    torch.manual_seed(torch.seed() % 2**31)

    def make() -> QTensor:
        return random_qtensor(
            case.nbits, case.shape, case.group_size, case.axis, case.dtype, quantised=case.quantised
        )

    first = make()
    moved = moved_bytes(first, case.dtype)
    inputs = [first, *(make() for _ in range(buffer_sets(moved) - 1))]
    if autotune:
        dequantize_qtensor(first, case.dtype, autotune=True)
    result = dequantize_qtensor(first, case.dtype)
    assert torch.equal(result, first.dequantize(case.dtype)), case
    del result
    ours = min(microseconds(lambda q: dequantize_qtensor(q, case.dtype), inputs) for _ in range(2))
    floor = moved / peak * 1e6
    line: dict[str, Any] = {
        **case.columns(),
        "floor": round(floor, 2),
        "ours": round(ours, 2),
        "of_bandwidth": round(floor / ours, 3),
    }
    if peers and not case.quantised and case.group_size == 64 and case.dtype == torch.bfloat16:
        line |= _peers(inputs)
        fastest = min(line[name] for name in ("original", "original_compiled", "seed_kernel") if name in line)
        line["speed_up"] = round(fastest / ours, 2)
    return line


def _peers(inputs: list[QTensor]) -> dict[str, Any]:
    assert torch.equal(unpack_eagerly(inputs[0]), inputs[0].dequantize())
    torch.compiler.reset()
    line: dict[str, Any] = {
        "original": round(eager_microseconds(unpack_eagerly, inputs), 1),
        "original_compiled": round(microseconds(compiled(), inputs), 1),
    }
    if inputs[0].spec.nbits in (8, 4):
        repacked = [w for w in map(in_adjacent_rows, inputs) if w is not None]
        times = {block: microseconds(run, repacked) for block, run in seed_kernels().items()}
        assert torch.equal(seed_kernels()[256](repacked[0]), inputs[0].dequantize())
        block = min(times, key=times.__getitem__)
        line |= {"seed_kernel": round(times[block], 1), "block_size": block}
    return line


_COLUMNS = ("original", "original_compiled", "seed_kernel", "block_size", "speed_up")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--peers", action="store_true", help="measure the others too (minutes, for the compiler)"
    )
    parser.add_argument("--autotune", action="store_true", help="tune tile sizes before measuring")
    parser.add_argument("--seconds", type=float, default=420, help="start no further case after this long")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    peak = bandwidth()
    print(f"bandwidth {peak / 1e12:.3f} TB/s", flush=True)
    lines: list[dict[str, Any]] = []
    for case in cases():
        if time.monotonic() > deadline:
            print("left out for time:", case.columns())
            continue
        lines.append(measure(case, peak, arguments.peers, arguments.autotune))
        print(lines[-1], flush=True)
        write_json(arguments.out / "dequant.json", record(lines, bandwidth_bytes_per_s=peak, unit="us"))
        torch.cuda.empty_cache()
    print(table([{**dict.fromkeys(_COLUMNS, ""), **line} for line in lines]))


if __name__ == "__main__":
    main()
