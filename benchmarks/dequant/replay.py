"""Launch recorded kernels with the CUDA driver alone, each tensor an allocation of exactly its size.

Run: compute-sanitizer --tool memcheck --error-exitcode 1 python -m benchmarks.dequant.replay FOLDER [--shrink BYTES]
Needs nothing but the driver, so it starts in a second even under a checker. FOLDER is `benchmarks.dequant.memcheck`'s.
--shrink makes every result that much smaller than the kernel takes it for: the checker must then complain.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_POISON = 0xFF
_Pointer = ctypes.c_uint64


class Driver:
    """The few calls of the CUDA driver that a launch takes; raises RuntimeError where one fails."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.call("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with CUDA error {status}")

    @contextmanager
    def function(self, cubin: bytes, name: str) -> Iterator[ctypes.c_void_p]:
        """Load a compiled kernel for as long as it is used."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), cubin)
        self.call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        yield function
        self.call("cuModuleUnload", module)

    def allocate(self, size: int) -> _Pointer:
        pointer = _Pointer()
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer

    def upload(self, pointer: _Pointer, content: bytes) -> None:
        self.call("cuMemcpyHtoD_v2", pointer, content, ctypes.c_size_t(len(content)))

    def download(self, pointer: _Pointer, size: int) -> bytes:
        content = ctypes.create_string_buffer(size)
        self.call("cuMemcpyDtoH_v2", content, pointer, ctypes.c_size_t(size))
        return content.raw


def replay(driver: Driver, launch: dict[str, Any], shrink: int = 0) -> None:
    """Launch what was recorded; raises RuntimeError unless the result has the recorded bytes."""
    tensors: list[_Pointer] = []
    values: list[ctypes._SimpleCData[int]] = []
    expected = base64.b64decode(launch["expected"])
    expected = expected[: len(expected) - shrink]
    for i, parameter in enumerate(launch["parameters"]):
        if "int" in parameter:
            kind = ctypes.c_int64 if parameter["size"] == 8 else ctypes.c_int32
            values.append(kind(parameter["int"]))
            continue
        content = base64.b64decode(parameter["bytes"])
        if i == launch["out"]:
            content = bytes([_POISON]) * len(expected)
        tensors.append(driver.allocate(len(content)))
        driver.upload(tensors[-1], content)
        values.append(tensors[-1])
    result = values[launch["out"]]
    # Triton appends pointers to memory that kernels like this one do not use.
    values += [_Pointer(), _Pointer()]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    with driver.function(base64.b64decode(launch["cubin"]), launch["name"]) as function:
        sizes = (*launch["grid"], launch["threads"], 1, 1, launch["shared"])
        driver.call("cuLaunchKernel", function, *sizes, None, pointers, None)
        driver.call("cuCtxSynchronize")
    found = driver.download(result, len(expected))
    for pointer in tensors:
        driver.call("cuMemFree_v2", pointer)
    if found != expected:
        raise RuntimeError("the replayed launch gave another result than the recorded one")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shrink", type=int, default=0, help="bytes by which results are too small")
    arguments = parser.parse_args()
    driver = Driver()
    files = sorted(arguments.folder.glob("*.json"))
    if not files:
        raise SystemExit(f"no recorded launches in {arguments.folder}; record them first")
    done = 0
    for path in files:
        launches = json.loads(path.read_text())
        for launch in launches:
            replay(driver, launch, arguments.shrink)
        done += len(launches)
    print(f"{done} launches from {len(files)} files, all with the recorded results", flush=True)


if __name__ == "__main__":
    main()
