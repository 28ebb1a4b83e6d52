"""A stand-in for hqq.kernels.cuda.Kernel that runs the kernel's source on the host, on CPU tensors."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from hqq.kernels.cuda.arguments import ArgumentPool
from hqq.kernels.cuda.loaded_kernel import Dim3, Resources
from hqq.kernels.cuda.source import Defines, Source, as_defines, read_source

HERE = Path(__file__).parent
# Optimised a little: most of the time goes into the compiler, for the small shapes of tests.
FLAGS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-shared",
    "-w",
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",
    "-fcf-protection=none",
)

# By name: CXX may be a C compiler's driver, which compiles C++ but does not link with its library.
LIBRARIES = ("-lstdc++",)

_KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^()]*\)\s+)?(\w+)\s*\(")


class HostError(Exception):
    """The kernel did what it must not: what, and which thread of which block."""


class HostKernel:
    """A kernel on the host, with the interface of Kernel; the device and the stream mean nothing here.

    `seed` decides the order in which threads take turns. Raises HostError for deadlocks, accesses outside shared memory
    or of unmapped memory, unaligned accesses, and lanes of a warp that meet in different operations.
    """

    def __init__(
        self,
        source: str | Source,
        name: str,
        signature: str,
        defines: Mapping[str, object] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.source = source if isinstance(source, Source) else read_source(source)
        self.name, self.seed = name, seed
        self._arguments = ArgumentPool(signature)
        library = ctypes.CDLL(str(_library(self.source, as_defines(defines or {}))))
        self._entry = getattr(library, f"launch_{name}")
        self._entry.restype = ctypes.c_char_p
        self._entry.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p]

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
        """Run the grid to its end."""
        shape = (ctypes.c_uint * 6)(*grid, *block)
        arguments = self._arguments.take(args)
        size = 1 if cluster is None else cluster[0]
        failed = self._entry(ctypes.addressof(shape), shared, size, self.seed, arguments.address)
        self._arguments.give(arguments)
        if failed is not None:
            raise HostError(f"{self.name}: {failed.decode()}")

    def prepare(self, device: int) -> None:
        """Do nothing: the library is built already."""

    def resources(self, device: int) -> Resources:
        """Return figures of a kernel that takes nothing."""
        return Resources(0, 0, 0)

    def blocks_per_multiprocessor(self, device: int, threads: int, shared: int = 0) -> int:
        """Return 1."""
        return 1


def compiler() -> str | None:
    """Return the C++ compiler that builds kernels for the host, None where there is none that would do."""
    return shutil.which(os.environ.get("CXX", "g++")) if os.name == "posix" else None


def build_folder() -> Path:
    """Return where libraries are kept between runs: beside what pytest keeps, which `make clean` removes."""
    return HERE.parents[2] / ".pytest_cache" / "d" / "cuda-on-host"


@cache
def _library(source: Source, defines: Defines) -> Path:
    texts = [file.read_text() for file in sorted(HERE.glob("*.h"))]
    key = source.digest(*texts, *FLAGS, *LIBRARIES, *(part for define in defines for part in define))
    path = build_folder() / f"{source.name.removesuffix('.cu')}-{key[:32]}.so"
    if not path.exists():
        _build(source, defines, path)
    return path


def _build(source: Source, defines: Defines, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for header, text in source.headers:
            (Path(folder) / header).write_text(text)
        unit = Path(folder) / f"{source.name}.cpp"
        entries = "\n".join(f"HOST_ENTRY({name})" for name in _KERNEL.findall(source.text))
        macros = "\n".join(f"#define {key} {value}" for key, value in defines)
        unit.write_text(
            f'#include "schedule.h"\n{macros}\n#line 1 "{source.name}"\n{source.text}\n{entries}\n'
        )
        built = Path(folder) / "kernel.so"
        cxx = compiler()
        assert cxx is not None, "check compiler() first"
        command = [cxx, *FLAGS, f"-I{HERE}", f"-I{folder}", "-o", str(built), str(unit), *LIBRARIES]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise HostError(f"{source.name} does not compile for the host: {macros}\n{done.stderr}")
        # Renamed into place, so that a test that runs beside this one never loads half a file.
        built.replace(path)
