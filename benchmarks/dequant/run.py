"""The table of dequantisation times: this library's kernel, the original eager and compiled, its extension, the seed's.

Run: python -m benchmarks.dequant.run --out FOLDER [--peers [--original PACKAGE_FOLDER]] [--autotune]
Writes FOLDER/dequant.json and prints a table. Microseconds per call, medians of CUDA-graph replays over rotated
buffers, each sent while the one before still runs (eager and extension without a graph), ours the median of five
captures; the floor is the bytes of codes, scale, zero and result over the measured bandwidth. Without --original its
formula is restated here, and the extension is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.dequant.peers import compiled, in_adjacent_rows, seed_kernels, unpack_eagerly
from benchmarks.dequant.tensors import moved_bytes, random_qtensor
from benchmarks.dequant.timing import bandwidth, buffer_sets, eager_microseconds, steady_microseconds
from benchmarks.dequant.warm import warm
from benchmarks.harness import record, table, write_json
from hqq.core.qtensor import QTensor
from hqq.kernels import dequantize_qtensor

_SMALL, _LARGE = (4096, 4096), (8192, 28672)
# Graphs captured one after the other write their results to different places in memory, which matters for large ones.
_CAPTURES = 5
_PEERS = ("original", "original_compiled", "aten", "seed_kernel")
_Times = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    shape: tuple[int, int]
    axis: int
    group_size: int
    nbits: int
    dtype: torch.dtype = torch.bfloat16
    quantised: bool = False

    @property
    def with_peers(self) -> bool:
        """Whether the others are measured too."""
        return not self.quantised and self.group_size == 64 and self.dtype == torch.bfloat16

    def make(self) -> QTensor:
        """Return a random tensor of this case."""
        return random_qtensor(
            self.nbits, self.shape, self.group_size, self.axis, self.dtype, quantised=self.quantised
        )

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


def compile_case(case: Case) -> None:
    """Put the kernels of `case` into Triton's cache on disk."""
    q = case.make()
    dequantize_qtensor(q, case.dtype)
    repacked = in_adjacent_rows(q) if case.with_peers else None
    if repacked is not None:
        for run in seed_kernels().values():
            run(repacked)


def measure(case: Case, peak: float, autotune: bool) -> tuple[_Times, list[QTensor]]:
    """Return the line of `case`, settings and microseconds, and the tensors it was measured with."""
    first = case.make()
    moved = moved_bytes(first, case.dtype)
    inputs = [first, *(case.make() for _ in range(buffer_sets(moved) - 1))]
    if autotune:
        dequantize_qtensor(first, case.dtype, autotune=True)
    result = dequantize_qtensor(first, case.dtype)
    assert torch.equal(result, first.dequantize(case.dtype)), case
    del result
    captures = [
        steady_microseconds(lambda q: dequantize_qtensor(q, case.dtype), inputs) for _ in range(_CAPTURES)
    ]
    ours = statistics.median(captures)
    floor = moved / peak * 1e6
    line = {
        **case.columns(),
        "floor": round(floor, 2),
        "ours": round(ours, 2),
        "ours_least": round(min(captures), 2),
        "ours_most": round(max(captures), 2),
        "over_floor": round(ours / floor, 3),
        "of_bandwidth": round(floor / ours, 3),
    }
    return line, inputs


def seed_times(inputs: list[QTensor]) -> _Times:
    """Return the time and block size of the re-created kernel at its fastest block size."""
    if inputs[0].spec.nbits not in (8, 4):
        return {}
    repacked = [w for w in map(in_adjacent_rows, inputs) if w is not None]
    times = {block: steady_microseconds(run, repacked, 7) for block, run in seed_kernels().items()}
    assert torch.equal(seed_kernels()[256](repacked[0]), inputs[0].dequantize())
    block = min(times, key=times.__getitem__)
    return {"seed_kernel": round(times[block], 1), "block_size": block}


def restated_times(inputs: list[QTensor]) -> _Times:
    """Return the times of the original's formula as `peers` has it."""
    assert torch.equal(unpack_eagerly(inputs[0]), inputs[0].dequantize())
    torch.compiler.reset()
    return {
        "original": round(eager_microseconds(unpack_eagerly, inputs), 1),
        "original_compiled": round(steady_microseconds(compiled(), inputs, 7), 1),
    }


def original_times(package: Path, wanted: list[Case]) -> dict[Case, _Times]:
    """Return the times of the original itself, taken in a process of its own."""
    given = [{"shape": c.shape, "axis": c.axis, "group_size": c.group_size, "nbits": c.nbits} for c in wanted]
    done = subprocess.run(
        _original(package), input=json.dumps(given), stdout=subprocess.PIPE, text=True, check=True
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(wanted, lines, strict=True))


def _original(package: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.dequant.original", str(package), *options]


_COLUMNS = (*_PEERS, "block_size", "speed_up")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--peers", action="store_true", help="measure the others too (minutes, for the compiler)"
    )
    parser.add_argument("--original", type=Path, help="folder of the original's package, for --peers")
    parser.add_argument("--workers", type=int, default=14, help="processes that compile beforehand")
    parser.add_argument("--autotune", action="store_true", help="tune tile sizes before measuring")
    parser.add_argument("--seconds", type=float, default=420, help="start no further case after this long")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    todo = list(cases())
    others = [case for case in todo if case.with_peers] if arguments.peers else []
    original = arguments.original if arguments.peers else None
    building = None if original is None else subprocess.Popen(_original(original, "--build"))
    warm(compile_case, todo, arguments.workers)
    if building is not None:
        building.wait()
    peak = bandwidth()
    print(f"bandwidth {peak / 1e12:.3f} TB/s", flush=True)
    theirs = {} if original is None else original_times(original, others)
    print(f"{deadline - time.monotonic():.0f} s left", flush=True)
    lines: list[_Times] = []
    for case in todo:
        if time.monotonic() > deadline:
            print("left out for time:", case.columns())
            continue
        line, inputs = measure(case, peak, arguments.autotune)
        lines.append(line)
        if case in others:
            line |= theirs[case] if theirs else restated_times(inputs)
            line |= seed_times(inputs)
            line["speed_up"] = round(min(line[name] for name in _PEERS if name in line) / line["ours"], 2)
        del inputs
        print(lines[-1], flush=True)
        write_json(
            arguments.out / "dequant.json",
            record(lines, bandwidth_bytes_per_s=peak, unit="us", original_is_restated=original is None),
        )
        torch.cuda.empty_cache()
    print(table([{**line, **{name: line.get(name, "") for name in _COLUMNS}} for line in lines]))


if __name__ == "__main__":
    main()
