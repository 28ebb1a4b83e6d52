"""Every instruction that the CUDA C++ kernels spell out, on the host and, where there is one, on a GPU.

The host stands in for the GPU in the tests of whole kernels. Here it is itself tested: both give the same answers,
those of plain torch and exact fractions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hqq.kernels.cuda import Kernel, unavailable_reason
from hqq.kernels.cuda.source import FOLDER, read_source
from tests.kernels.cuda_on_host.host_kernel import HERE, HostKernel, compiler
from tests.kernels.cuda_on_host.memory import guarded

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
Launch = Callable[..., list[Tensor]]


@pytest.fixture(params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest, seed: int) -> Launch:
    """Run a kernel of a source on copies of tensors and return the copies."""
    on_host = request.param == "host"
    reason = (None if compiler() else "there is no C++ compiler here") if on_host else unavailable_reason()
    if reason:
        pytest.skip(reason)

    def launch(
        name: str,
        kernel: str,
        tensors: list[Tensor],
        *numbers: int,
        block: int = 32,
        grid: int = 1,
        cluster: int = 1,
        shared: int = 0,
        **defines: Any,
    ) -> list[Tensor]:
        signature = "P" * len(tensors) + "i" * len(numbers)
        shape = ((grid, 1, 1), (block, 1, 1))
        how = {"shared": shared, "cluster": (cluster, 1, 1) if cluster > 1 else None}
        if on_host:
            with guarded(*tensors) as copies:
                made = HostKernel(read_source(name, HERE), kernel, signature, defines, seed=seed)
                made.launch(0, *shape, (*(t.data_ptr() for t in copies), *numbers), **how)
                return [t.clone() for t in copies]
        copies = [t.cuda() for t in tensors]
        on_gpu = Kernel(read_source(name, HERE), kernel, signature, defines)
        on_gpu.launch(0, *shape, (*(t.data_ptr() for t in copies), *numbers), **how)
        return [t.cpu() for t in copies]

    return launch


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan") if dtype.is_floating_point else -77, dtype=dtype)


def test_mma_of_bytes(run: Launch, rng: torch.Generator) -> None:
    a = torch.randint(0, 256, (16, 32), generator=rng).to(torch.uint8)
    b = torch.randint(-128, 128, (8, 32), generator=rng).to(torch.int8)
    c = torch.randint(-(1 << 30), 1 << 30, (16, 8), generator=rng).to(torch.int32)
    out = run(
        "instructions.cu", "product_of_bytes", [poisoned(16, 8, dtype=torch.int32), a, b, c], TYPE="F16"
    )[0]
    assert torch.equal(out, c + (a.int() @ b.int().T))


def test_maximum_keeps_nan(run: Launch, rng: torch.Generator) -> None:
    a, b = (torch.randn(32, generator=rng) for _ in range(2))
    a[0] = b[1] = float("nan")
    a[2] = b[3] = float("inf")
    out = run("instructions.cu", "larger", [poisoned(32), a, b], TYPE="F16")[0]
    assert torch.equal(out.isnan(), torch.arange(32) < 2)
    assert torch.equal(out[2:], torch.maximum(a, b)[2:])


@pytest.mark.parametrize("count", [0, 1, 77, 128])
def test_copies(run: Launch, rng: torch.Generator, count: int) -> None:
    a, b = (torch.randint(-(1 << 31), 1 << 31, (128,), generator=rng).to(torch.int32) for _ in range(2))
    tensors = [poisoned(2, 128, dtype=torch.int32), a, b]
    out = run("instructions.cu", "copies", tensors, 4 * count, shared=1024, TYPE="F16")[0]
    assert torch.equal(out, torch.stack([a, torch.where(torch.arange(128) < count, b, 0)]))


def halves(words: Tensor) -> Tensor:
    return words.view(torch.int16).view(*words.shape, 2)


def fused(x: float, y: float, z: float) -> float | Fraction:
    """Return x y + z: exact where it is a number, else what IEEE 754 says."""
    if not all(map(math.isfinite, (x, y, z))):
        return x * y + z
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    return exact or x * y + z  # the sign of a zero


def rounded(value: float | Fraction, dtype: torch.dtype) -> float:
    """Return the number of `dtype` nearest to `value`, ties to the one with an even last bit."""
    if isinstance(value, float) and (math.isnan(value) or math.isinf(value) or value == 0):
        return value
    info = torch.finfo(dtype)
    size = abs(Fraction(value))
    exponent = max(math.floor(math.log2(size)) if size > 1e-300 else -999, round(math.log2(info.tiny)))
    # The logarithm may be off by one; too small an exponent only shows as a step too fine.
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exponent > round(math.log2(info.tiny)) and size < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** exponent * Fraction(info.eps)
    near = round(size / step) * step
    number = float(near) if near <= Fraction(info.max) else math.inf
    return math.copysign(number, value)


def assert_rounded(words: Tensor, exact: list[Any], dtype: torch.dtype) -> None:
    got = halves(words).view(dtype).double().flatten()
    expected = torch.tensor([rounded(value, dtype) for value in exact], dtype=torch.float64)
    assert torch.equal(got.isnan(), expected.isnan())
    number = ~got.isnan()
    assert torch.equal(got[number], expected[number])
    assert torch.equal(got[number].signbit(), expected[number].signbit())


@pytest.mark.parametrize("name", DTYPES)
def test_arithmetic(run: Launch, rng: torch.Generator, name: str) -> None:
    n = 2048
    # All bit patterns, subnormal numbers, infinities and NaN among them; and numbers near one, which meet more often.
    wild = torch.randint(-(1 << 31), 1 << 31, (3, n // 2), generator=rng).to(torch.int32)
    tame = torch.randn(3, n // 2, 2, generator=rng).to(DTYPES[name]).view(torch.int32).squeeze(-1)
    a, b, c = torch.cat([wild, tame], 1)
    tensors = [poisoned(15, n, dtype=torch.int32), a, b, c]
    rows = run("instructions.cu", "arithmetic", tensors, n, grid=n // 128, block=128, TYPE=name)[0]
    x, y, z = (halves(v).view(DTYPES[name]).double() for v in (a, b, c))
    triples = zip(*(v.flatten().tolist() for v in (x, y, z)), strict=True)
    pairs = torch.stack([a.view(torch.float32), b.view(torch.float32)], -1).double()
    exact = [
        [fused(*triple) for triple in triples],
        *(v.flatten().tolist() for v in (x * y, pairs)),
    ]
    for row, values in enumerate(exact):
        assert_rounded(rows[row], values, DTYPES[name])
    assert_rounded(rows[12], (-x).flatten().tolist(), DTYPES[name])
    for row, half in ((3, 0), (4, 1)):
        got = rows[row].view(torch.float32).double()
        assert torch.equal(got.nan_to_num(7.5), x[:, half].nan_to_num(7.5))
    words = [v.numpy().view(np.uint32).astype(np.uint64) for v in (a, b, c)]
    both = words[0] | words[1] << 32
    signs = np.zeros(n, np.uint64)
    plain = np.zeros(n, np.uint64)
    for i in range(4):
        nibble = words[2] >> (4 * i) & 15
        byte = both >> (8 * (nibble & 7)) & 255
        plain |= byte << (8 * i)
        signs |= np.where(nibble & 8, (byte >> 7) * 255, byte) << (8 * i)
    expected = {
        5: signs,
        6: words[0] & words[1] | words[2],
        7: words[0] & words[1] ^ words[2],
        8: plain,
        9: both >> (words[2] & 31) & 0xFFFFFFFF,
        10: np.array([int(w).bit_count() for w in words[0]], np.uint64),
        11: np.array([32 - int(w).bit_length() for w in words[0]], np.uint64),
        13: (words[0] & 0xFFFF) * 0x10001,
        14: (words[0] >> 16) * 0x10001,
    }
    for row, values in expected.items():
        assert np.array_equal(rows[row].numpy().view(np.uint32), values.astype(np.uint32)), f"row {row}"


def test_shuffles(run: Launch, rng: torch.Generator) -> None:
    values = torch.randint(0, 1 << 30, (64,), generator=rng).to(torch.int32)
    rows = run(
        "instructions.cu", "shuffles", [poisoned(8, 64, dtype=torch.int32), values], block=64, TYPE="F16"
    )[0]

    def from_lanes(source: Callable[[int], int]) -> Tensor:
        return values[[warp + source(lane) for warp in (0, 32) for lane in range(32)]]

    assert torch.equal(rows[0], from_lanes(lambda lane: lane ^ 5))
    assert torch.equal(rows[1], from_lanes(lambda lane: lane ^ 16 if (lane ^ 16) < lane else lane))
    assert torch.equal(rows[2], from_lanes(lambda lane: lane + 3 if lane + 3 < 32 else lane))
    assert torch.equal(rows[3], from_lanes(lambda lane: lane + 3 if lane % 16 + 3 < 16 else lane))
    assert torch.equal(rows[4], from_lanes(lambda lane: lane - 2 if lane % 8 >= 2 else lane))
    assert torch.equal(rows[5], from_lanes(lambda lane: lane // 4 * 4 + (lane + 1) % 4))
    odd = (values & 1).view(2, 32)
    ballots = [sum(int(bit) << lane for lane, bit in enumerate(warp)) for warp in odd]
    assert [int(v) & 0xFFFFFFFF for v in rows[6]] == [ballots[t // 32] for t in range(64)]
    assert torch.equal(rows[7], from_lanes(lambda lane: lane ^ (1 if lane < 16 else 2)))


def test_named_barriers(run: Launch) -> None:
    out = run(
        "instructions.cu", "two_warps", [poisoned(20, 32, dtype=torch.int32)], 20, block=64, TYPE="F16"
    )[0]
    assert torch.equal(out, (100 * torch.arange(20)[:, None] + torch.arange(32) + 1).int())


@pytest.mark.parametrize("n", [8, 96, 256])
@pytest.mark.parametrize("name", DTYPES)
def test_wgmma(run: Launch, rng: torch.Generator, name: str, n: int) -> None:
    a, b = (torch.randint(-8, 9, (rows, 64), generator=rng).to(DTYPES[name]) for rows in (64, n))
    tensors = [poisoned(64, n), a, b]
    defines = {"TYPE": name, "COLUMNS": n, "STAGES": 1}
    out = run("instructions_sm90.cu", "warpgroup_product", tensors, block=128, shared=128 * n, **defines)[0]
    assert torch.equal(out, a.float() @ b.float().T)


@pytest.mark.parametrize("stages", [1, 3])
def test_bulk_copies(run: Launch, rng: torch.Generator, stages: int) -> None:
    values = torch.randint(0, 1 << 29, (11, 128), generator=rng).to(torch.int32)
    tensors = [poisoned(11, 128, dtype=torch.int32), values]
    defines = {"TYPE": "F16", "COLUMNS": 8, "STAGES": stages}
    out = run("instructions_sm90.cu", "pipeline", tensors, 11, block=160, shared=512 * stages, **defines)[0]
    assert torch.equal(out, 3 * values)


def test_blocks_of_a_cluster_send_to_each_other(run: Launch, rng: torch.Generator) -> None:
    values = torch.randint(-99, 99, (2, 4, 128), generator=rng).float()
    shape = {"grid": 8, "cluster": 4, "shared": 2048}
    out = run("instructions_cluster.cu", "cluster_sum", [poisoned(2, 4, 128), values], **shape)[0]
    assert torch.equal(out, values.sum(1, keepdim=True).expand(2, 4, 128))


def test_blocks_that_wait_for_each_other(run: Launch, rng: torch.Generator) -> None:
    values = torch.randint(-99, 99, (20, 128), generator=rng).float()
    tensors = [poisoned(20, 128), torch.zeros(20, dtype=torch.int32), values]
    out = run("instructions_cluster.cu", "chain", tensors, grid=20)[0]
    assert torch.equal(out, values.cumsum(0))


def test_stmatrix(run: Launch, rng: torch.Generator) -> None:
    elements = torch.randint(0, 1 << 15, (4, 8, 8), generator=rng).to(torch.int16)
    fragments = elements.view(torch.int32)  # lane 4 i + j holds elements 2 j and 2 j + 1 of row i
    tensors = [poisoned(4, 8, 8, dtype=torch.int16), fragments]
    out = run("instructions_cluster.cu", "store_matrices", tensors)[0]
    assert torch.equal(out, elements.transpose(1, 2))


def test_every_instruction_has_a_version_for_the_host() -> None:
    name = re.compile(r"^HQQ_INLINE [\w ]+?(\w+)\(", re.MULTILINE)
    wanted = {n for file in FOLDER.glob("ptx*.cuh") for n in name.findall(file.read_text())}
    on_host = {n for file in HERE.glob("*.h") for n in re.findall(r"\b\w+\b", file.read_text())}
    assert {"ldg128", "pack2", "wgmma", "store_at"} <= wanted
    assert wanted <= on_host
