"""Runs the launchers of CUDA C++ kernels as they are, on CPU tensors, with their kernels on the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from unittest.mock import patch

from tests.kernels.cuda_on_host.host_kernel import HostKernel


@contextmanager
def kernels_on_host(*launchers: ModuleType, seed: int = 0, multiprocessors: int = 3) -> Iterator[None]:
    """Let the modules make HostKernels where they would make Kernels, for a GPU of so many multiprocessors.

    `seed` decides the order in which threads take turns. The host holds six blocks at a time.
    """
    with ExitStack() as stack:
        for module in launchers:
            stack.enter_context(patch.object(module, "Kernel", partial(HostKernel, seed=seed)))
            if hasattr(module, "multiprocessors"):
                stack.enter_context(patch.object(module, "multiprocessors", lambda device: multiprocessors))
            # Neither kernels that were made before nor, later, those of the host.
            _clear_caches(module)
            stack.callback(_clear_caches, module)
        yield


def _clear_caches(module: ModuleType) -> None:
    for value in vars(module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
