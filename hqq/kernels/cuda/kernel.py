"""A kernel of a CUDA C++ source: compiled and loaded on first use on each device, launched with little overhead."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch

from hqq.kernels.cuda.arguments import ArgumentPool
from hqq.kernels.cuda.module import checked, ensure_context, load_function
from hqq.kernels.cuda.source import Source, as_defines, read_source

if TYPE_CHECKING:
    from cuda.bindings import driver

Dim3: TypeAlias = tuple[int, int, int]

# Shared memory that a block may have without asking for more.
_DEFAULT_SHARED = 48 << 10
_MOST_CONFIGS = 512


class Resources(NamedTuple):
    """What one block of a kernel takes: registers per thread, bytes of spilled registers, static shared memory."""

    registers: int
    local_bytes: int
    static_shared: int


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
        self._loaded: dict[int, _OnDevice] = {}
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

    def _load(self, device: int) -> _OnDevice:
        with self._lock:
            if device not in self._loaded:
                function = load_function(self.source, self.defines, self.name, device)
                self._loaded[device] = _OnDevice(function, device)
            return self._loaded[device]


def prepare_all(kernels: Iterable[Kernel], device: int, threads: int | None = None) -> None:
    """Compile and load `kernels` for CUDA device `device`, several at a time, so that no first launch waits for it."""
    with ThreadPoolExecutor(threads, thread_name_prefix="hqq-compile") as pool:
        # The results are taken for the errors among them.
        list(pool.map(lambda kernel: kernel.prepare(device), kernels))


class _OnDevice:
    """A loaded kernel and the launch configurations that were used with it."""

    def __init__(self, function: driver.CUfunction, device: int) -> None:
        from cuda.bindings import driver

        self.function, self.device = function, device
        self.launch = driver.cuLaunchKernelEx
        self._configs: dict[tuple[object, ...], driver.CUlaunchConfig] = {}
        self._shared = _DEFAULT_SHARED
        self._lock = threading.Lock()

    def config(
        self, stream: int, grid: Dim3, block: Dim3, shared: int, pdl: bool, cluster: Dim3 | None
    ) -> driver.CUlaunchConfig:
        # Kept, since building one takes longer than launching; nobody changes a configuration once it is in use.
        key = (stream, grid, block, shared, pdl, cluster)
        found = self._configs.get(key)
        if found is None:
            self._allow_shared(shared)
            found = _launch_config(stream, grid, block, shared, pdl, cluster)
            if len(self._configs) >= _MOST_CONFIGS:
                self._configs.clear()
            self._configs[key] = found
        return found

    def launch_again(self, error: int, config: driver.CUlaunchConfig, arguments: int, doing: str) -> None:
        """Launch in a thread that had no context so far; raise KernelError for any other error."""
        from cuda.bindings import driver

        if error != driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
            checked((error,), doing)
        with torch.cuda.device(self.device):
            ensure_context(self.device)
            checked(driver.cuLaunchKernelEx(config, self.function, arguments, 0), doing)

    def resources(self) -> Resources:
        from cuda.bindings.driver import CUfunction_attribute as Attribute

        return Resources(
            self._attribute(Attribute.CU_FUNC_ATTRIBUTE_NUM_REGS),
            self._attribute(Attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES),
            self._attribute(Attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES),
        )

    def occupancy(self, threads: int, shared: int) -> int:
        from cuda.bindings import driver

        self._allow_shared(shared)
        with torch.cuda.device(self.device):
            blocks = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self.function, threads, shared)
        return int(checked(blocks, "asking how many blocks fit"))

    def _attribute(self, attribute: driver.CUfunction_attribute) -> int:
        from cuda.bindings import driver

        return int(checked(driver.cuFuncGetAttribute(attribute, self.function), f"reading {attribute.name}"))

    def _allow_shared(self, shared: int) -> None:
        from cuda.bindings import driver

        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        with self._lock:
            if shared > self._shared:
                result = driver.cuFuncSetAttribute(self.function, attribute, shared)
                checked(result, f"asking for {shared} bytes of shared memory per block")
                self._shared = shared


def _launch_config(
    stream: int, grid: Dim3, block: Dim3, shared: int, pdl: bool, cluster: Dim3 | None
) -> driver.CUlaunchConfig:
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = block
    config.sharedMemBytes, config.hStream = shared, driver.CUstream(stream)
    attributes = []
    if pdl:
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        attributes.append(early)
    if cluster is not None:
        together = driver.CUlaunchAttribute()
        together.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        together.value.clusterDim.x, together.value.clusterDim.y, together.value.clusterDim.z = cluster
        attributes.append(together)
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config
