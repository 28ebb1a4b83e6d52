"""A kernel of a CUDA C++ source: compiled and loaded on first use on each device, launched with little overhead."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from hqq.kernels.cuda.arguments import ArgumentPool
from hqq.kernels.cuda.loaded_kernel import Dim3, LoadedKernel, Resources
from hqq.kernels.cuda.module import load_function
from hqq.kernels.cuda.source import Source, as_defines, read_source


class Kernel:
    """`extern "C" __global__ void name(...)` of a source in this folder, with `defines` set.

    `signature` has a letter for each argument: P a pointer (an int, as Tensor.data_ptr() gives it), q a 64-bit and i a
    32-bit integer, f a float.
    """

    def __init__(
        self, source: str | Source, name: str, signature: str, defines: Mapping[str, object] | None = None
    ) -> None:
        self.source = source if isinstance(source, Source) else read_source(source)
        self.name, self.defines = name, as_defines(defines or {})
        self._arguments = ArgumentPool(signature)
        self._loaded: dict[int, LoadedKernel] = {}
        self._lock = threading.Lock()

    def launch(
        self,
        device: int,
        grid: Dim3,
        block: Dim3,
        args: tuple[int | float, ...],
        *,
        shared: int = 0,
        pdl: bool = False,
        cluster: Dim3 | None = None,
        stream: int | None = None,
    ) -> None:
        """Launch on CUDA device `device`, on its current torch stream unless the handle of another is given.

        `shared` counts bytes of dynamic shared memory. `pdl` lets the kernel start before the one in front of it on the
        stream has ended; it must call pdl_wait() before it reads what that one writes. Nothing is synchronised.
        Raises KernelError if the kernel does not compile, or the driver refuses the launch.
        """
        loaded = self._loaded.get(device) or self._load(device)
        if stream is None:
            # What torch.cuda.current_stream(device).cuda_stream returns, without its microseconds.
            stream = torch._C._cuda_getCurrentRawStream(device)
        config = loaded.config(stream, grid, block, shared, pdl, cluster)
        arguments = self._arguments.take(args)
        try:
            if torch._C._cuda_getDevice() == device:
                (error,) = loaded.launch(config, loaded.function, arguments.address, 0)
            else:
                with torch.cuda.device(device):
                    (error,) = loaded.launch(config, loaded.function, arguments.address, 0)
            if error:
                how = f"{grid=} {block=} {shared=} {pdl=} {cluster=} {args=}"
                loaded.launch_again(error, config, arguments.address, f"launching {self.name} with {how}")
        finally:
            self._arguments.give(arguments)

    def prepare(self, device: int) -> None:
        """Compile and load the kernel for `device` now, not at the first launch."""
        if device not in self._loaded:
            self._load(device)

    def resources(self, device: int) -> Resources:
        """Return what the kernel takes on `device`, as compiled for it."""
        return (self._loaded.get(device) or self._load(device)).resources()

    def blocks_per_multiprocessor(self, device: int, threads: int, shared: int = 0) -> int:
        """Return how many blocks of `threads` threads and `shared` dynamic bytes fit one multiprocessor at a time."""
        return (self._loaded.get(device) or self._load(device)).occupancy(threads, shared)

    def _load(self, device: int) -> LoadedKernel:
        with self._lock:
            if device not in self._loaded:
                function = load_function(self.source, self.defines, self.name, device)
                self._loaded[device] = LoadedKernel(function, device)
            return self._loaded[device]


def prepare_all(kernels: Iterable[Kernel], device: int, threads: int | None = None) -> None:
    """Compile and load `kernels` for CUDA device `device`, several at a time, so that no first launch waits for it."""
    with ThreadPoolExecutor(threads, thread_name_prefix="hqq-compile") as pool:
        # The results are taken for the errors among them.
        list(pool.map(lambda kernel: kernel.prepare(device), kernels))
