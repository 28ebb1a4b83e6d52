"""How long the first dequantisation of a process takes with nothing in Triton's cache, and where the time goes.

Run: python -m benchmarks.dequant.first_call [--bits 4] [--axis 1] [--further]
Prints seconds: importing Triton, Triton's own start, the stages of the compiler, and all of the first call. --further
adds the first calls of other variants. Needs a GPU, whose context exists before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch

from benchmarks.dequant.tensors import random_qtensor
from hqq.core.qtensor import QTensor
from hqq.kernels import dequantize_qtensor

_SHAPE = (4096, 4096)


class Clock:
    """Seconds by what took them, in the order of their end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add what runs meanwhile to `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def text(self) -> str:
        return ", ".join(f"{name} {seconds:.3f}" for name, seconds in self.seconds.items())


def tensor_of(nbits: int, axis: int, quantised: bool = False) -> QTensor:
    """Return a random tensor, complete on the GPU."""
    q = random_qtensor(nbits, _SHAPE, 64, axis, torch.bfloat16, quantised=quantised)
    torch.cuda.synchronize()
    return q


def call(q: QTensor, clock: Clock) -> None:
    """Time one call, waited for."""
    with clock.timed("whole call"):
        dequantize_qtensor(q, torch.bfloat16)
        torch.cuda.synchronize()


def listen(clock: Clock) -> None:
    """Have Triton report its compiler's stages to `clock`, where it can."""
    import triton

    if not hasattr(triton, "knobs"):
        return

    def heard(*, times: Any, **_: Any) -> None:
        stages = {"front end": times.ir_initialization, **dict(times.lowering_stages)}
        for name, microseconds in stages.items():
            clock.seconds[name] = clock.seconds.get(name, 0.0) + microseconds * 1e-6

    triton.knobs.compilation.listener = heard


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--axis", type=int, default=1)
    parser.add_argument("--further", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        q, clock = tensor_of(arguments.bits, arguments.axis), Clock()
        with clock.timed("all"):
            with clock.timed("import triton"):
                import triton  # noqa: F401
            with clock.timed("import the kernel"):
                from hqq.kernels.dequant_start import start_triton
            listen(clock)
            with clock.timed("start triton"):
                start_triton()
            call(q, clock)
        print(f"{arguments.bits} bit axis {arguments.axis}: {clock.text()}", flush=True)
        variants = product((False, True), (8, 4, 3, 2, 1), (1, 0)) if arguments.further else ()
        for quantised, nbits, axis in variants:
            clock.seconds.clear()
            call(tensor_of(nbits, axis, quantised), clock)
            print(f"then {nbits} bit axis {axis}{' quantised' * quantised}: {clock.text()}", flush=True)


if __name__ == "__main__":
    main()
