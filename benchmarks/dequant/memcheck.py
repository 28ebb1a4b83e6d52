"""Odd shapes through every variant of the dequantisation kernel, for a memory checker to watch.

Run: compute-sanitizer --tool memcheck --error-exitcode 1 python -m benchmarks.dequant.memcheck [--bits 8,4,3,2,1]
A run without the checker beforehand fills Triton's cache, so that nothing is compiled under it.
"""

from __future__ import annotations

import argparse
import os

import torch

from benchmarks.dequant.tensors import random_qtensor
from hqq.kernels import dequantize_qtensor

_SHAPES: tuple[tuple[tuple[int, ...], int | None], ...] = (
    ((7, 24), 8),
    ((9, 10), 5),
    ((33, 130), 10),
    ((66, 96), 48),
    ((257, 36), None),
    ((5, 3, 2, 16), 16),
    ((1031, 64), 64),
)

# The shipped choice, which leaves small tensors alone, and one with everything that large ones get.
_CONFIGS: tuple[tuple[int, ...] | None, ...] = (None, (64, 2, 2, 2, 3, 1, 1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", default="8,4,3,2,1")
    bits = [int(nbits) for nbits in parser.parse_args().bits.split(",")]
    # Without torch's allocator each tensor is an allocation of its own, with nothing behind it to read by mistake.
    assert os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") == "1", "set PYTORCH_NO_CUDA_MEMORY_CACHING=1"
    for nbits in bits:
        print(f"{nbits} bit: {check(nbits)} calls, all equal to the reference", flush=True)


def check(nbits: int) -> int:
    """Run every case of `nbits` and return how many there were."""
    checked = 0
    for axis in (1, 0):
        for shape, group_size in _SHAPES:
            for dtype in (torch.bfloat16, torch.float32):
                for quantised in (False, True):
                    q = random_qtensor(nbits, shape, group_size, axis, dtype, quantised=quantised)
                    expected = q.dequantize(dtype)
                    for config in _CONFIGS:
                        result = dequantize_qtensor(q, dtype, config=config)
                        case = (nbits, axis, shape, dtype, quantised, config)
                        assert torch.equal(result, expected), case
                        checked += 1
    return checked


if __name__ == "__main__":
    main()
