"""CUDA C++ to machine code through NVRTC, which needs neither a toolkit nor a GPU; results are kept on disk."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from hqq.errors import KernelError
from hqq.kernels.cuda import cubin_cache
from hqq.kernels.cuda.source import Defines, Source

if TYPE_CHECKING:
    from cuda.bindings import nvrtc

_HOW_TO_GET = "pip install cuda-bindings and the nvidia-cuda-nvrtc of torch's CUDA version"


@cache
def compiler_missing_reason() -> str | None:
    """Return None if CUDA C++ can be compiled here, else a sentence that says what is missing."""
    try:
        found = find_spec("cuda.bindings.nvrtc") is not None
    except ModuleNotFoundError:  # there is no package `cuda` at all
        found = False
    if not found:
        return f"cuda-bindings is not installed ({_HOW_TO_GET})"
    try:
        nvrtc_version()
    except (ImportError, RuntimeError) as error:
        return f"the NVRTC library cannot be used ({error}); {_HOW_TO_GET}"
    return None


def arch_of(capability: tuple[int, int]) -> str:
    """Return the architecture to compile for on a device of this compute capability.

    Raises KernelError for devices before 8.0, whose tensor cores lack bf16, and for ones newer than the compiler knows.
    """
    major, minor = capability
    if capability < (8, 0):
        found = f"compute capability {major}.{minor}"
        raise KernelError(f"got a device of {found}; the CUDA kernels need 8.0 or later")
    # Machine code runs on later devices of its own major version as well.
    known = [arch for arch in _architectures() if arch // 10 == major and arch % 10 <= minor]
    if not known:
        raise KernelError(
            f"got a device of compute capability {major}.{minor}, which NVRTC {'.'.join(map(str, nvrtc_version()))} "
            f"does not compile for; install a newer nvidia-cuda-nvrtc"
        )
    # The instructions of exactly 9.0 (wgmma) are behind a name of their own.
    return "sm_90a" if max(known) == 90 else f"sm_{max(known)}"


def cubin(source: Source, defines: Defines, arch: str) -> bytes:
    """Return machine code of `source` for `arch` ("sm_90a"), from disk if the same was compiled before.

    Raises KernelError with the compiler's log if the source does not compile.
    """
    options = _options(defines, arch)
    key = source.digest(*options, "nvrtc", *map(str, nvrtc_version()))
    name = f"{source.name.removesuffix('.cu')}-{arch}-{key[:32]}"
    kept = cubin_cache.read(name)
    if kept is None:
        kept = _compile(source, options)
        cubin_cache.write(name, kept)
    return kept


def _options(defines: Defines, arch: str) -> list[str]:
    return [f"--gpu-architecture={arch}", "--std=c++17", *(f"-D{name}={value}" for name, value in defines)]


def _compile(source: Source, options: list[str]) -> bytes:
    from cuda.bindings import nvrtc

    names = [name.encode() for name, _ in source.headers]
    texts = [text.encode() for _, text in source.headers]
    main = (source.text.encode(), source.name.encode())
    error, program = nvrtc.nvrtcCreateProgram(*main, len(names), texts, names)
    _check(error, f"creating a program of {source.name}")
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelError(f"{source.name} does not compile ({' '.join(options)}):\n{_log(program)}")
        error, size = nvrtc.nvrtcGetCUBINSize(program)
        _check(error, "asking for the size of the machine code")
        code = bytearray(size)
        (error,) = nvrtc.nvrtcGetCUBIN(program, code)
        _check(error, "reading the machine code")
        return bytes(code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _log(program: nvrtc.nvrtcProgram) -> str:
    from cuda.bindings import nvrtc

    error, size = nvrtc.nvrtcGetProgramLogSize(program)
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        return "(no log)"
    log = bytearray(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    return log.rstrip(b"\0").decode(errors="replace").strip()


def _check(error: nvrtc.nvrtcResult, doing: str) -> None:
    from cuda.bindings import nvrtc

    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelError(f"NVRTC failed with {error.name} when {doing}")


@cache
def nvrtc_version() -> tuple[int, int]:
    """Return the compiler's major and minor version."""
    from cuda.bindings import nvrtc

    error, major, minor = nvrtc.nvrtcVersion()
    _check(error, "asking for its version")
    return int(major), int(minor)


@cache
def _architectures() -> tuple[int, ...]:
    from cuda.bindings import nvrtc

    error, known = nvrtc.nvrtcGetSupportedArchs()
    _check(error, "asking for its architectures")
    return tuple(known)
