"""Compiling CUDA C++: what identifies a compilation, what is kept on disk, and what is said where it cannot be done."""

from __future__ import annotations

from pathlib import Path

import pytest

from hqq.errors import KernelError
from hqq.kernels.cuda import compiler_missing_reason, cubin_cache, nvrtc
from hqq.kernels.cuda.arguments import ArgumentPool
from hqq.kernels.cuda.source import FOLDER, as_defines, read_source

NO_COMPILER = compiler_missing_reason()
needs_compiler = pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))

KERNEL = '#include "one.cuh"\nextern "C" __global__ void set(int* p) { *p = VALUE + one(); }\n'
HEADERS = {
    "one.cuh": '#include "two.cuh"\n__device__ int one() { return two() / 2; }\n',
    "two.cuh": "__device__ int two() { return 2; }\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set.cu").write_text(KERNEL)
    for name, text in HEADERS.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The options of every compilation, by a compiler that returns them as its machine code."""
    calls: list[list[str]] = []

    def compiler(source: object, options: list[str]) -> bytes:
        calls.append(options)
        return " ".join(options).encode()

    monkeypatch.setattr(nvrtc, "_compile", compiler)
    monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: (13, 0))
    return calls


def test_headers_are_found_through_headers(folder: Path) -> None:
    assert dict(read_source("set.cu", folder).headers) == HEADERS


def test_headers_of_the_package_are_found_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "other.cu").write_text('#include "ptx_sm90.cuh"\n')
    headers = dict(read_source("other.cu", tmp_path).headers)
    assert headers == {name: (FOLDER / name).read_text() for name in ("ptx.cuh", "ptx_sm90.cuh")}


def test_defines_have_one_order_and_form() -> None:
    assert as_defines({"B": True, "A": 3, "C": "F16"}) == (("A", "3"), ("B", "1"), ("C", "F16"))


def test_machine_code_is_kept(folder: Path, compiled: list[list[str]]) -> None:
    source, defines = read_source("set.cu", folder), as_defines({"VALUE": 3})
    code = nvrtc.cubin(source, defines, "sm_90a")
    assert b"-DVALUE=3" in code and b"sm_90a" in code
    assert nvrtc.cubin(source, defines, "sm_90a") == code
    assert len(compiled) == 1


@pytest.mark.parametrize("what", ["defines", "architecture", "header", "compiler"])
def test_everything_that_matters_is_compiled_again(
    folder: Path, compiled: list[list[str]], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    nvrtc.cubin(read_source("set.cu", folder), (("VALUE", "3"),), "sm_90a")
    value, arch = "3", "sm_90a"
    if what == "defines":
        value = "4"
    elif what == "architecture":
        arch = "sm_80"
    elif what == "header":
        (folder / "two.cuh").write_text("__device__ int two() { return 4; }\n")
        read_source.cache_clear()
    else:
        monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: (13, 1))
    nvrtc.cubin(read_source("set.cu", folder), (("VALUE", value),), arch)
    assert len(compiled) == 2


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_damaged_file_is_compiled_again(
    folder: Path, compiled: list[list[str]], damage: bytes | None
) -> None:
    source = read_source("set.cu", folder)
    code = nvrtc.cubin(source, (), "sm_90a")
    (file,) = cubin_cache.path_of("x").parent.iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"?" if damage is None else damage)
    assert nvrtc.cubin(source, (), "sm_90a") == code
    assert nvrtc.cubin(source, (), "sm_90a") == code
    assert len(compiled) == 2


def test_folder_that_cannot_be_written_costs_a_warning(
    folder: Path, compiled: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HQQ_CACHE_DIR", str(folder / "set.cu"))  # a file, where a folder would have to be
    with pytest.warns(RuntimeWarning, match="could not keep a compiled kernel"):
        code = nvrtc.cubin(read_source("set.cu", folder), (), "sm_90a")
    assert code.endswith(b"--std=c++17")


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((9, 0), "sm_90a"), ((8, 0), "sm_80"), ((8, 7), "sm_86"), ((8, 9), "sm_89"), ((10, 3), "sm_100")],
)
def test_architecture_of_a_device(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], arch: str
) -> None:
    monkeypatch.setattr(nvrtc, "_architectures", lambda: (75, 80, 86, 89, 90, 100, 120))
    assert nvrtc.arch_of(capability) == arch


@pytest.mark.parametrize(
    ("capability", "why"), [((7, 5), "need 8.0 or later"), ((11, 0), "newer nvidia-cuda-nvrtc")]
)
def test_device_without_an_architecture(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], why: str
) -> None:
    monkeypatch.setattr(nvrtc, "_architectures", lambda: (75, 80, 90))
    monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: (13, 0))
    with pytest.raises(KernelError, match=why):
        nvrtc.arch_of(capability)


def test_arguments_lie_as_their_types_want_it() -> None:
    pool = ArgumentPool("Pqif")
    arguments = pool.take((1 << 40, -2, -3, 0.5))
    raw = bytes(arguments.slots)
    assert [int.from_bytes(raw[i : i + 8], "little", signed=True) for i in (0, 8)] == [1 << 40, -2]
    assert int.from_bytes(raw[16:20], "little", signed=True) == -3
    assert raw[24:28] == bytes.fromhex("0000003f")
    # A second launch at the same time has memory of its own; afterwards it is used again.
    other = pool.take((0, 0, 0, 0.0))
    assert other.address != arguments.address and bytes(arguments.slots) == raw
    pool.give(other)
    assert pool.take((5, 5, 5, 5.0)) is other


def test_unknown_signature_is_an_error() -> None:
    with pytest.raises(KernelError, match="got signature 'Px'"):
        ArgumentPool("Px")


@needs_compiler
def test_compiles_with_headers(folder: Path) -> None:
    code = nvrtc.cubin(read_source("set.cu", folder), (("VALUE", "1"),), "sm_80")
    assert code.startswith(b"\x7fELF") and b"set" in code


@needs_compiler
def test_log_of_what_does_not_compile(folder: Path) -> None:
    with pytest.raises(
        KernelError, match=r"(?s)set\.cu does not compile \(.*-DVALUE=nothing.*\"nothing\" is undefined"
    ):
        nvrtc.cubin(read_source("set.cu", folder), (("VALUE", "nothing"),), "sm_80")
