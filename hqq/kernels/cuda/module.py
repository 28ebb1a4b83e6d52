"""Machine code on devices: loaded once for each device into the context that torch uses there."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from hqq.errors import KernelError
from hqq.kernels.cuda.nvrtc import arch_of, compiler_missing_reason, cubin, nvrtc_version
from hqq.kernels.cuda.source import Defines, Source

if TYPE_CHECKING:
    from cuda.bindings import driver


class _Modules:
    """What is loaded, by (source, defines, device index)."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.lock = threading.Lock()
        self.loaded: dict[tuple[Source, Defines, int], driver.CUmodule] = {}


_modules = _Modules()
# A lock that another thread holds at a fork stays locked in the child, where what is loaded means nothing.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_modules.forget)


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Return None if the CUDA kernels run on `device` (default: the current one), else a sentence that says why not."""
    if device is not None and device.type != "cuda":
        return f"the tensor is on {device}, and the CUDA kernels take CUDA tensors"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU on this machine"
    missing = compiler_missing_reason()
    if missing is not None:
        return missing
    too_old = _driver_reason()
    if too_old is not None:
        return too_old
    try:
        device_arch(torch.cuda.current_device() if device is None or device.index is None else device.index)
    except KernelError as error:
        return str(error)
    return None


@cache
def _driver_reason() -> str | None:
    # Machine code loads into every driver of the compiler's own major version, and into later ones.
    from cuda.bindings import driver

    version = int(checked(driver.cuDriverGetVersion(), "asking for the driver's version"))
    compiler = nvrtc_version()
    if version // 1000 >= compiler[0]:
        return None
    return (
        f"the driver is for CUDA {version // 1000}.{version % 1000 // 10}, and NVRTC {compiler[0]}.{compiler[1]} makes "
        f"code for later ones; install the nvidia-cuda-nvrtc and cuda-bindings of CUDA {version // 1000}"
    )


@cache
def device_arch(device: int) -> str:
    """Return the architecture to compile for on CUDA device `device`; raises KernelError where there is none."""
    return arch_of(torch.cuda.get_device_capability(device))


def load_function(source: Source, defines: Defines, name: str, device: int) -> driver.CUfunction:
    """Return the kernel `name` of `source` on CUDA device `device`, compiled and loaded if it is not yet.

    Threads may call this at once, and so may a stream that is being captured into a graph.
    """
    from cuda.bindings import driver

    key = (source, defines, device)
    # Outside the lock: compiling takes long, and several threads may do it at once.
    code = None if key in _modules.loaded else cubin(source, defines, device_arch(device))
    with _modules.lock, torch.cuda.device(device), _capture_allowed():
        ensure_context(device)
        module = _modules.loaded.get(key)
        if module is None:
            module = checked(driver.cuModuleLoadData(code), f"loading {source.name}")
            _modules.loaded[key] = module
        function = driver.cuModuleGetFunction(module, name.encode())
        return checked(function, f"looking up {name} in {source.name}")


def ensure_context(device: int) -> None:
    """Make the context that torch uses on `device`, torch's current device, this thread's if it has none yet.

    The driver wants one; torch itself takes care of it only when it first does something there in a thread.
    """
    from cuda.bindings import driver

    if not int(checked(driver.cuCtxGetCurrent(), "asking for the context")):
        context = checked(driver.cuDevicePrimaryCtxRetain(device), f"opening device {device}")
        checked(driver.cuCtxSetCurrent(context), "setting the context")


def checked(result: tuple[Any, ...], doing: str) -> Any:
    """Return what a driver call returned beside its status; raises KernelError if it failed when `doing`."""
    from cuda.bindings import driver

    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(error)
        told = text.decode() if text else ""
        raise KernelError(f"the CUDA driver failed with {error.name} ({told}) when {doing}")
    return values[0] if values else None


@contextmanager
def _capture_allowed() -> Iterator[None]:
    # Loading allocates, which a capture in another mode than this one would take as its end.
    from cuda.bindings import driver

    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = checked(driver.cuThreadExchangeStreamCaptureMode(relaxed), "allowing a kernel to be loaded")
    try:
        yield
    finally:
        checked(driver.cuThreadExchangeStreamCaptureMode(before), "restoring the capture mode")
