"""Products with tiled weights on a GPU: the whole grid through the operator, against exact products."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hqq.kernels import TiledWeight, tiled_dequantize, tiled_linear
from hqq.kernels.cuda import unavailable_reason
from tests.kernels.quantized import ALLOW_SCRIPT_METHOD
from tests.kernels.tiled import LIMIT, exact, random_qtensor

pytestmark = pytest.mark.gpu

DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def needs_kernels() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = unavailable_reason(torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(reason)


def poisoned(*shape: int, dtype: torch.dtype, device: str) -> None:
    """Leave NaN in the memory that the next allocation of this size takes."""
    torch.full(shape, float("nan"), dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256, None])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_products(bits: int, axis: int, group_size: int | None, dtype: torch.dtype) -> None:
    for N, K in ((256, 512), (528, 1040), (4096, 2816)):
        if group_size is not None and (K if axis == 1 else N) % group_size:
            continue
        q = random_qtensor(bits, N, K, axis, group_size, dtype, "cuda")
        weight = TiledWeight.from_qtensor(q, dtype)
        W, bias = exact(q), torch.randn(N, device="cuda").to(dtype)
        assert torch.equal(tiled_dequantize(weight), q.dequantize(dtype))
        for M in (1, 2, 3, 8, 11, 16, 17, 64, 130, 300, 700):
            x = torch.randn(M, K, device="cuda").to(dtype)
            poisoned(M, N, dtype=dtype, device="cuda")
            y = tiled_linear(x, weight, bias)
            expected = x.double() @ W.T + bias.double()
            error = float((y.double() - expected).norm() / expected.norm())
            assert error <= LIMIT[dtype], (N, K, M, error)
            assert torch.equal(y, tiled_linear(x, weight, bias)), (N, K, M)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("M", [1, 5, 40, 600])
def test_gradients_are_those_of_the_reference(M: int, axis: int) -> None:
    q = random_qtensor(4, 384, 512, axis, 64, torch.bfloat16, "cuda")
    weight = TiledWeight.from_qtensor(q, torch.bfloat16)
    x = torch.randn(M, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(M, 384, device="cuda", dtype=torch.bfloat16)
    tiled_linear(x, weight, bias).backward(grad)
    got = x.grad, bias.grad
    x.grad = bias.grad = None
    F.linear(x, q.dequantize(torch.bfloat16), bias).backward(grad)
    assert torch.equal(got[0], x.grad)  # type: ignore[arg-type]
    assert torch.equal(got[1], bias.grad)  # type: ignore[arg-type]


def test_joined_weights() -> None:
    for axis in (0, 1):
        parts = [random_qtensor(4, N, 1024, axis, 64, torch.bfloat16, "cuda") for N in (1024, 256, 256)]
        tiled = [TiledWeight.from_qtensor(q, torch.bfloat16) for q in parts]
        joined = TiledWeight.cat(tiled)
        for M in (1, 16, 64):
            x = torch.randn(M, 1024, device="cuda", dtype=torch.bfloat16)
            together = tiled_linear(x, joined)
            expected = x.double() @ torch.cat([exact(q) for q in parts]).T
            assert float((together.double() - expected).norm() / expected.norm()) <= LIMIT[torch.bfloat16]


@ALLOW_SCRIPT_METHOD
@pytest.mark.parametrize("M", [1, 40, 600])
def test_graphs_streams_and_compile(M: int) -> None:
    q = random_qtensor(3, 512, 768, 1, 64, torch.float16, "cuda")
    weight = TiledWeight.from_qtensor(q, torch.float16)
    x = torch.randn(M, 768, device="cuda", dtype=torch.float16)
    expected = tiled_linear(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tiled_linear(x, weight)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, expected)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = tiled_linear(x, weight)
    stream.synchronize()
    assert torch.equal(on_stream, expected)

    def double(v: torch.Tensor) -> torch.Tensor:
        return 2 * tiled_linear(v, weight)

    compiled = torch.compile(double, fullgraph=True)
    assert torch.equal(compiled(x), 2 * expected)


def test_opcheck() -> None:
    q = random_qtensor(4, 128, 256, 1, 64, torch.bfloat16, "cuda")
    w = TiledWeight.from_qtensor(q, torch.bfloat16)
    shape = (w.bits, 1, w.group_size, 128, 256)
    x = torch.randn(3, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.library.opcheck(torch.ops.hqq.tiled_linear.default, (x, bias, w.codes, w.meta, w.rows, *shape))
    torch.library.opcheck(torch.ops.hqq.tiled_dequantize.default, (w.codes, w.meta, w.rows, *shape))


def test_unaligned_and_strided_inputs() -> None:
    q = random_qtensor(4, 128, 256, 1, 64, torch.bfloat16, "cuda")
    weight = TiledWeight.from_qtensor(q, torch.bfloat16)
    for M in (1, 20):
        storage = torch.randn(M * 256 + 1, device="cuda").bfloat16()
        x = storage[1:].view(M, 256)
        assert torch.equal(tiled_linear(x, weight), tiled_linear(x.clone(), weight))
        wide = torch.randn(M, 512, device="cuda").bfloat16()[:, ::2]
        assert torch.equal(tiled_linear(wide, weight), tiled_linear(wide.contiguous(), weight))
        batch = torch.randn(2, M, 256, device="cuda").bfloat16()
        assert tiled_linear(batch, weight).shape == (2, M, 128)


def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    q = random_qtensor(4, 512, 768, 1, 64, torch.bfloat16, "cuda:0")
    here = TiledWeight.from_qtensor(q, torch.bfloat16)
    there = here.to("cuda:1")
    for M in (1, 40, 600):
        x = torch.randn(M, 768, device="cuda:0").bfloat16()
        # The current device stays cuda:0.
        assert torch.equal(tiled_linear(x.to("cuda:1"), there).cpu(), tiled_linear(x, here).cpu())
    assert torch.equal(tiled_dequantize(there).cpu(), tiled_dequantize(here).cpu())
