"""Odd shapes through every variant of the dequantisation kernel, recorded so that a memory checker can watch them.

Run: python -m benchmarks.dequant.memcheck FOLDER [--bits 8,4,3,2,1] [--workers 14]
     compute-sanitizer --tool memcheck --error-exitcode 1 python -m benchmarks.dequant.replay FOLDER
Starting torch under the checker takes minutes, so this part runs without it: it compares each call with the torch
reference and writes the compiled kernels with their arguments to FOLDER; `replay` launches those with the driver alone.
"""

from __future__ import annotations

import argparse
import base64
import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.dequant.tensors import random_qtensor
from benchmarks.dequant.warm import warm
from hqq.kernels import dequant_launch, dequantize_qtensor
from hqq.kernels.dequant_kernel import dequantize_kernel

Shape = tuple[int, ...]

_SHAPES: tuple[tuple[Shape, int | None], ...] = (
    ((7, 24), 8),
    ((9, 10), 5),
    ((33, 130), 10),
    ((66, 96), 48),
    ((257, 36), None),
    ((5, 3, 2, 16), 16),
    ((1031, 64), 64),
    # So many groups that quantised scales have a run of scales of their own for each tile.
    ((64, 512), 4),
)

# The shipped choice, which leaves small tensors alone, and two with everything that large ones get.
_CONFIGS: tuple[tuple[int, ...] | None, ...] = (
    None,
    (64, 2, 2, 2, 3, 1, 1, 3),
    (64, 1, 1, 2, 2, 4, 1, 3, 4, 6),
)


class Recorder:
    """Stands in for the kernel: launches it, and keeps what was launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._run, grid)

    def _run(self, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        out = self.kernel.arg_names.index("out")
        inputs = ["" if i == out else _bytes_of(arg) for i, arg in enumerate(args)]
        compiled = self.kernel[grid](*args, **options)
        types = compiled.src.signature
        parameters: list[dict[str, Any]] = []
        for name, arg, content in zip(self.kernel.arg_names, args, inputs, strict=False):
            kind = types[name]
            if kind.startswith("*"):
                parameters.append({"bytes": content})
            elif kind != "constexpr":
                parameters.append({"int": arg, "size": 8 if kind == "i64" else 4})
        self.launches.append(
            {
                "name": compiled.metadata.name,
                "cubin": _text(compiled.asm["cubin"]),
                "grid": [*grid, 1, 1][:3],
                "threads": 32 * compiled.metadata.num_warps,
                "shared": compiled.metadata.shared,
                "parameters": parameters,
                "out": out,
                "expected": _bytes_of(args[out]),
            }
        )


def _bytes_of(arg: Any) -> str | None:
    if not isinstance(arg, Tensor):
        return None
    return _text(arg.reshape(-1).view(torch.uint8).cpu().numpy().tobytes())


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def record_case(folder: Path, case: tuple[int, int, int]) -> None:
    """Record the launches of one bit width, axis and shape (by number) into a file of `folder`."""
    nbits, axis, number = case
    shape, group_size = _SHAPES[number]
    recorder = Recorder(dequantize_kernel)
    with mock.patch.object(dequant_launch, "dequantize_kernel", recorder):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for quantised in (False, True):
                q = random_qtensor(nbits, shape, group_size, axis, dtype, quantised=quantised)
                expected = q.dequantize(dtype)
                for config in _CONFIGS:
                    result = dequantize_qtensor(q, dtype, config=config)
                    assert torch.equal(result, expected), (case, dtype, quantised, config)
    (folder / f"{nbits}bit-axis{axis}-{number}.json").write_text(json.dumps(recorder.launches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", default="8,4,3,2,1")
    parser.add_argument("--workers", type=int, default=14, help="processes that compile and record")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    bits = map(int, arguments.bits.split(","))
    todo = [(nbits, axis, number) for nbits in bits for axis in (1, 0) for number in range(len(_SHAPES))]
    warm(partial(record_case, arguments.folder), todo, arguments.workers)
    print(f"{len(todo)} files, every call equal to the reference")


if __name__ == "__main__":
    main()
