"""Quantise linear layers on the CPU, with solver="hqq" or another, against the original hqq on the same machine.

    python -m benchmarks.cpu_solver --original-python PATH [--solver hqq] [--threads 1 2] [--repetitions 9]
        [--output FILE]

PATH is the Python of an environment with `hqq==0.2.8.post1`; without it only this package is timed. Both sides run
in their own interpreter and take turns, so that both see the same machine; what is reported is the median, and the
ratio of the medians (below 1: this package is faster). `best_cpu_ratio` is that of the least processor times, which
other work on the machine hardly touches. With two threads leave the machine alone: on busy cores both mostly wait.

The packed codes are compared as well. With more than one thread they may differ: torch then sums the error that the
stop rule compares in another order, and where the errors of two iterations are equal but for rounding, the original
stops earlier or later than it does with one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.harness import RESULTS, record, spread, table, write_json

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "stdlib-llama" / "model.safetensors"
GROUP_SIZE = 64
LARGE_SHAPES = ((1024, 4096), (4096, 1024), (1024, 1024))


class Side:
    """A `solver_worker` in its own interpreter."""

    def __init__(self, python: str, own: bool) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        if own:
            environment["PYTHONPATH"] = str(ROOT)
        self._process = subprocess.Popen(
            [python, str(ROOT / "benchmarks" / "solver_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.identity: dict[str, str] = self._read()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have the worker quantise once and return its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"got no answer from {self._process.args!r}; its error is printed above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the worker."""
        self._process.communicate()


@contextmanager
def both_sides(original_python: str | None) -> Iterator[dict[str, Side]]:
    """Start the workers; yields this package's under "ours" and the other under "original"."""
    sides = {"ours": Side(sys.executable, own=True)}
    try:
        if original_python is not None:
            sides["original"] = Side(original_python, own=False)
        yield sides
    finally:
        for side in sides.values():
            side.close()


def trained_like(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return random weights [N, K] with the tails and the uneven rows and columns of trained ones."""
    N, K = shape
    # Student's t with 5 degrees of freedom: a normal over the root of a chi-square divided by its degrees.
    chi_square = torch.randn(5, N, K, generator=generator).square().mean(0)
    W = torch.randn(N, K, generator=generator) / chi_square.sqrt()
    rows = torch.exp(0.3 * torch.randn(N, 1, generator=generator))
    columns = torch.exp(0.3 * torch.randn(1, K, generator=generator))
    return (0.02 * W * rows * columns).to(torch.bfloat16)


def weight_sets() -> dict[str, dict[str, Tensor]]:
    """Return the sets of weights by name: the shipped model's linears, and larger random ones."""
    generator = torch.Generator().manual_seed(0)
    return {
        "stdlib-llama": {name: W for name, W in load_file(MODEL).items() if "_proj" in name},
        "large": {f"{n}x{k}": trained_like((n, k), generator) for n, k in LARGE_SHAPES},
    }


def measure(sides: dict[str, Side], request: dict[str, Any], repetitions: int) -> dict[str, Any]:
    """Return the spread of both sides' times for one request, their ratio, and whether the codes agree."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    cpu_times: dict[str, list[float]] = {name: [] for name in sides}
    digests = set()
    for repetition in range(repetitions + 1):
        order = list(sides) if repetition % 2 else list(reversed(sides))
        for name in order:
            answer = sides[name].ask(request)
            digests.add(answer["digest"])
            if repetition:  # the first is the warm-up
                times[name].append(answer["seconds"])
                cpu_times[name].append(answer["cpu_seconds"])
    measured: dict[str, Any] = {name: spread(values) for name, values in times.items()}
    if "original" in sides:
        measured["ratio"] = ratio(times, statistics.median)
        measured["best_cpu_ratio"] = ratio(cpu_times, min)
        measured["same_codes"] = len(digests) == 1
    return measured


def ratio(times: dict[str, list[float]], summary: Callable[[list[float]], float]) -> float:
    """Return our `summary` of the times over the original's."""
    return round(summary(times["ours"]) / summary(times["original"]), 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--original-python", help="Python of an environment with the original hqq")
    parser.add_argument("--solver", default="hqq", help="ours; the original has but one")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_solver.json")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder, both_sides(arguments.original_python) as sides:
        for name, weights in weight_sets().items():
            file = str(Path(folder) / f"{name}.safetensors")
            save_file(weights, file)
            for threads, nbits, axis in itertools.product(arguments.threads, (8, 4, 2), (1, 0)):
                case: dict[str, Any] = {"nbits": nbits, "axis": axis, "group_size": GROUP_SIZE}
                case |= {"threads": threads, "solver": arguments.solver}
                measured = measure(sides, {"weights": file, **case}, arguments.repetitions)
                elements = sum(W.numel() for W in weights.values())
                rows.append({"weights": name, "elements": elements, **case, **measured})
                print(table([flat(rows[-1])]).splitlines()[-1], flush=True)
        other = sides["original"].identity if "original" in sides else {}
        versions = {f"original_{key}": value for key, value in other.items()}
    print(table([flat(row) for row in rows]))
    note = (
        "medians over alternating repetitions of quantising every layer of the set once; HQQLinear, float16"
    )
    write_json(
        arguments.output, record(rows, versions=versions, note=note, repetitions=arguments.repetitions)
    )


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return `row` with each side's median in place of its spread."""
    return {key: value["median_ms"] if isinstance(value, dict) else value for key, value in row.items()}


if __name__ == "__main__":
    main()
