"""Which tile sizes and variants of the dequantisation kernel are fastest: the measurement behind the shipped choice.

Run: python -m benchmarks.dequant.explore --out FOLDER [--bits 8,4,3,2,1] [--axes 1,0] [--seconds 400]
Writes FOLDER/dequant_explore.json and prints, for each case, the fastest variants and the shipped one.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.dequant.tensors import moved_bytes, random_qtensor
from benchmarks.dequant.timing import bandwidth, buffer_sets, microseconds
from benchmarks.harness import record, table, write_json
from hqq.core.qtensor import QTensor
from hqq.kernels.dequant_config import Config, default_config, full_width
from hqq.kernels.dequant_launch import launch, matrix_view
from hqq.kernels.dequant_plan import inline_stat

_SHAPES = ((8192, 28672), (4096, 4096))
_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Variant:
    """Tile sizes, and what is otherwise fixed in the kernel."""

    config: Config
    asm: bool = True
    load_policy: str = ""
    store_hint: str = ""

    @property
    def name(self) -> str:
        """Short name: block/warps/steps and what differs from the shipped kernel."""
        extras = ["" if self.asm else "cast", self.load_policy, self.store_hint]
        return "/".join(map(str, self.config)) + "".join(f" {extra}" for extra in extras if extra)


def variants(axis: int) -> list[Variant]:
    """Return what is tried: the tile sizes first, then one change at a time to the shipped ones."""
    width = full_width(_DTYPE.itemsize, 1)
    steps = (1, 2, 4, 8, 16) if axis == 0 else (1, 2, 4)
    tried = [Variant(Config(width * w, w, s)) for w in (2, 4, 8) for s in steps]
    base = Config(width * 4, 4, 4 if axis == 0 else 1)
    tried += [
        Variant(Config(width * 16, 16, 1)),
        Variant(Config(width * 8, 4, 1)),  # 16 bytes of codes per load, results exchanged between threads
        Variant(base, asm=False),
        Variant(base, load_policy="evict_first"),
        Variant(base, store_hint=".cs"),
        Variant(base, load_policy="evict_first", store_hint=".cs"),
        Variant(base, store_hint=".wt"),
    ]
    return tried


def time_variant(variant: Variant, inputs: list[QTensor]) -> float:
    """Return microseconds per call of `variant`."""

    def run(q: QTensor) -> Tensor:
        return launch(
            q.W_q,
            inline_stat(q.scale, _DTYPE),
            inline_stat(q.zero, _DTYPE),
            q.spec,
            _DTYPE,
            _DTYPE,
            variant.config,
            asm=variant.asm,
            load_policy=variant.load_policy,
            store_hint=variant.store_hint,
        )

    assert torch.equal(run(inputs[0]), inputs[0].dequantize()), variant.name
    return microseconds(run, inputs)


def explore(shape: tuple[int, int], nbits: int, axis: int, peak: float) -> dict[str, Any]:
    """Return the times of every variant for one case, fastest first."""
    first = random_qtensor(nbits, shape, 64, axis, _DTYPE)
    moved = moved_bytes(first, _DTYPE)
    inputs = [first, *(random_qtensor(nbits, shape, 64, axis, _DTYPE) for _ in range(buffer_sets(moved) - 1))]
    times = {variant.name: round(time_variant(variant, inputs), 3) for variant in variants(axis)}
    view = matrix_view(first.spec, Config(1 << 16, 1, 1))
    shipped = Variant(default_config(view, _DTYPE.itemsize)).name
    return {
        "shape": shape,
        "bits": nbits,
        "axis": axis,
        "floor_us": round(moved / peak * 1e6, 2),
        "shipped": shipped,
        "us": dict(sorted(times.items(), key=lambda item: item[1])),
    }


def row(case: dict[str, Any]) -> dict[str, object]:
    """Return the line of the printed table for one case."""
    times, floor = case["us"], case["floor_us"]
    best = list(times.items())[:4]
    changed = [
        f"{name} {us}" for name, us in times.items() if " " in name or name.startswith(("4096/", "2048/4"))
    ]
    return {
        "case": f"{case['shape'][0]} {case['bits']}b ax{case['axis']}",
        "floor": floor,
        "best/floor": round(best[0][1] / floor, 3),
        "shipped": times.get(case["shipped"]),
        "best": ", ".join(f"{name} {us}" for name, us in best),
        "changed": ", ".join(changed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", default="4,1,8,3,2")
    parser.add_argument("--axes", default="1,0")
    parser.add_argument("--seconds", type=float, default=400, help="start no further case after this long")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    peak = bandwidth()
    print(f"bandwidth {peak / 1e12:.3f} TB/s", flush=True)
    cases: list[dict[str, Any]] = []
    for nbits in map(int, arguments.bits.split(",")):
        for axis in map(int, arguments.axes.split(",")):
            for shape in _SHAPES:
                if time.monotonic() > deadline:
                    print(f"left out for time: {shape} {nbits} bit axis {axis}")
                    continue
                cases.append(explore(shape, nbits, axis, peak))
                print(row(cases[-1]), flush=True)
                content = record(cases, bandwidth_bytes_per_s=peak)
                write_json(arguments.out / "dequant_explore.json", content)
    print(table([row(case) for case in cases]))


if __name__ == "__main__":
    main()
