"""Compiling beforehand in many processes: Triton keeps kernels on disk, and compiling takes longer than measuring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

import torch

T = TypeVar("T")


def warm(run: Callable[[T], object], items: Sequence[T], workers: int) -> None:
    """Call `run`, a function of a module, on every item in `workers` processes that share the GPU."""
    with ProcessPoolExecutor(min(workers, len(items)), mp_context=get_context("spawn")) as pool:
        list(pool.map(_run, [run] * len(items), items))


def _run(run: Callable[[T], object], item: T) -> None:
    run(item)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
