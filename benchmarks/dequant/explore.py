"""Which configurations of the dequantisation kernel are fastest: the measurement behind the shipped choice.

Run: python -m benchmarks.dequant.explore --out FOLDER [--bits 8,4,3,2,1] [--axes 1,0] [--only TEXT]
     TRITON_INTERPRET=1 python -m benchmarks.dequant.explore --out FOLDER     (on a CPU: does it all run?)
--only takes the cases whose name has TEXT in it.
Prints each case's configurations, fastest first, as times over the floor (median, least and most of several captures;
microseconds for short runs), the shipped one marked, and writes FOLDER/dequant_explore.json. Names are
block/warps/steps and, after a letter each, stripe, burst@distance, Phase, cs for streaming, resident, overlap (see
`Config`). In the interpreter tensors are tiny and nothing is timed; results are checked in both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.dequant.tensors import moved_bytes, random_qtensor
from benchmarks.dequant.timing import bandwidth, buffer_sets, steady_microseconds
from benchmarks.dequant.variants import LARGE, SMALL, Case, sweep
from benchmarks.dequant.warm import warm
from benchmarks.harness import record, write_json
from hqq.core.qtensor import QTensor
from hqq.kernels.availability import interpreting
from hqq.kernels.dequant_config import Config, check_config, default_config
from hqq.kernels.dequant_launch import launch, matrix_view
from hqq.kernels.dequant_plan import inline_stat

_TINY = 128  # what shapes are divided by in the interpreter
_LONG_US = 30


def name_of(config: Config) -> str:
    """Return the short name of `config`, without what is off."""
    name = f"{config.block}/{config.warps}/{config.steps}"
    name += f" s{config.stripe}" if config.stripe else ""
    name += f" p{config.burst}@{config.distance}" if config.burst else ""
    name += f" P{config.phase}" if config.phase else ""
    name += " cs" * config.streaming
    name += f" r{config.resident}" if config.resident else ""
    return name + f" o{config.overlap}"


def tensor_of(case: Case) -> QTensor:
    """Return a random tensor of `case`, tiny in the interpreter."""
    device = "cpu" if interpreting() else "cuda"
    return random_qtensor(
        case.nbits,
        case.shape,
        case.group_size,
        case.axis,
        case.dtype,
        quantised=case.quantised,
        device=device,
    )


def run_one(q: QTensor, dtype: torch.dtype, config: Config) -> Tensor:
    """Return `q` dequantised with `config`."""
    scale, zero = inline_stat(q.scale, dtype), inline_stat(q.zero, dtype)
    return launch(q.W_q, scale, zero, q.spec, dtype, dtype, config)


def shipped(q: QTensor, dtype: torch.dtype) -> Config:
    """Return the library's own choice for `q`."""
    assert q.spec.format is not None
    stat_bytes = sum(inline_stat(stat, dtype).values.itemsize for stat in (q.scale, q.zero))
    view = matrix_view(q.spec, Config(1 << 16, 1, 1))
    return default_config(view, q.spec.format.fields, dtype.itemsize, stat_bytes)


def compile_one(job: tuple[Case, Config | None]) -> None:
    """Put one kernel into Triton's cache on disk; None stands for the shipped configuration."""
    case, config = job
    q = tensor_of(case)
    run_one(q, case.dtype, config or shipped(q, case.dtype))


def explore(case: Case, peak: float, captures: int) -> dict[str, Any]:
    """Return the times of every configuration for one case, fastest median first."""
    first = tensor_of(case)
    moved = moved_bytes(first, case.dtype)
    timed = not interpreting()
    inputs = [first, *(tensor_of(case) for _ in range(buffer_sets(moved) - 1 if timed else 0))]
    own = shipped(first, case.dtype)
    configs = [check_config(config) for config in dict.fromkeys([own, *case.configs])]
    expected = first.dequantize(case.dtype)
    for config in configs:
        assert torch.equal(run_one(first, case.dtype, config), expected), (case, config)
    del expected
    times: dict[Config, list[float]] = {config: [] for config in configs}
    # Round after round: where results lie differs from capture to capture, and clocks drift.
    for _ in range(captures if timed else 0):
        for config, taken in times.items():
            function = partial(run_one, dtype=case.dtype, config=config)
            taken.append(steady_microseconds(function, inputs, 5 if case.large else 9))
    ranked = sorted(configs, key=lambda config: statistics.median(times[config] or [0.0]))
    return {
        "case": case.name,
        "floor_us": round(moved / peak * 1e6, 2),
        "shipped": name_of(own),
        "us": {name_of(config): [round(us, 3) for us in times[config]] for config in ranked},
    }


def lines_of(found: dict[str, Any]) -> list[str]:
    """Return what is printed of one case."""
    floor = found["floor_us"]
    if interpreting():
        return [f"## {found['case']}: {len(found['us'])} configurations, all right: {', '.join(found['us'])}"]
    unit = floor if floor > _LONG_US else 1.0
    lines = [f"## {found['case']}: floor {floor} us"]
    for name, taken in found["us"].items():
        least, middle, most = (f"{f(taken) / unit:.3f}" for f in (min, statistics.median, max))
        mark = "*" if name == found["shipped"] else " "
        lines.append(
            f" {mark} {name:<44} {statistics.median(taken) / floor:.3f}   {middle} ({least} to {most})"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="only cases with this in their name")
    parser.add_argument("--bits", default="4,1,8,3,2")
    parser.add_argument("--axes", default="1,0")
    parser.add_argument("--captures", type=int, default=6, help="graphs per configuration")
    parser.add_argument("--seconds", type=float, default=400, help="start no further case after this long")
    parser.add_argument("--workers", type=int, default=14, help="processes that compile beforehand")
    arguments = parser.parse_args()
    begin = time.monotonic()
    bits, axes = (list(map(int, text.split(","))) for text in (arguments.bits, arguments.axes))
    todo = [case for case in sweep([LARGE, SMALL], bits, axes) if arguments.only in case.name]
    peak = 1.0
    if interpreting():
        todo = [replace(case, shape=(case.shape[0] // _TINY, case.shape[1] // _TINY)) for case in todo]
    else:
        jobs = [(case, config) for case in todo for config in (None, *case.configs)]
        warm(compile_one, jobs, arguments.workers)
        peak = bandwidth()
    print(
        f"{len(todo)} cases ready after {time.monotonic() - begin:.0f} s; {peak / 1e12:.3f} TB/s", flush=True
    )
    cases: list[dict[str, Any]] = []
    for case in todo:
        if time.monotonic() > begin + arguments.seconds:
            print(f"left out for time: {case.name}")
            continue
        cases.append(explore(case, peak, arguments.captures))
        print("\n".join(lines_of(cases[-1])), flush=True)
        content = record(cases, bandwidth_bytes_per_s=peak, unit="us")
        write_json(arguments.out / "dequant_explore.json", content)
        if not interpreting():
            torch.cuda.empty_cache()
    print(f"done after {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
