"""A kernel on one device: its launch configurations, and what the driver knows about it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch

from hqq.kernels.cuda.module import checked, ensure_context

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


class LoadedKernel:
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
        """Return the configuration of such launches, which nobody may change."""
        # Kept, since building one takes longer than launching.
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
        """Return what the kernel takes, as compiled."""
        from cuda.bindings.driver import CUfunction_attribute as Attribute

        return Resources(
            self._attribute(Attribute.CU_FUNC_ATTRIBUTE_NUM_REGS),
            self._attribute(Attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES),
            self._attribute(Attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES),
        )

    def occupancy(self, threads: int, shared: int) -> int:
        """Return how many blocks fit a multiprocessor."""
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
        if shared <= self._shared:
            return
        with self._lock, torch.cuda.device(self.device):
            ensure_context(self.device)
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
