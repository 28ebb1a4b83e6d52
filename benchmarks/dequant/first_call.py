"""How long the first dequantisation of a process takes with nothing in Triton's cache, and where the time goes.

Run: python -m benchmarks.dequant.first_call [--bits 4] [--axis 1] [--further]
Prints seconds: importing Triton and the kernel, Triton's own start and the stages of the compiler, which are parts of
the whole call, and all together. --further adds the first calls of other variants. Needs a GPU, whose context exists
before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, ParamSpec, TypeVar
from unittest import mock

import torch

from benchmarks.dequant.tensors import random_qtensor
from hqq.core.qtensor import QTensor
from hqq.kernels import dequantize_qtensor

P = ParamSpec("P")
T = TypeVar("T")

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

    def around(self, name: str, function: Callable[P, T]) -> Callable[P, T]:
        """Return `function` with its time added to `name`."""

        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            with self.timed(name):
                return function(*args, **kwargs)

        return timed

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
                from hqq.kernels import dequant_launch, dequant_start, dequant_tune  # noqa: F401
            listen(clock)
            start = clock.around("start triton", dequant_start.start_triton)
            with mock.patch.object(dequant_launch, "start_triton", start):
                call(q, clock)
        print(f"{arguments.bits} bit axis {arguments.axis}: {clock.text()}", flush=True)
        variants = product((False, True), (8, 4, 3, 2, 1), (1, 0)) if arguments.further else ()
        for quantised, nbits, axis in variants:
            clock.seconds.clear()
            call(tensor_of(nbits, axis, quantised), clock)
            print(f"then {nbits} bit axis {axis}{' quantised' * quantised}: {clock.text()}", flush=True)


if __name__ == "__main__":
    main()
