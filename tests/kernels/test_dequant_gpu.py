"""What only a GPU can show: large tensors, CUDA graphs, streams, several devices, tuning."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from hqq.core.backend import HQQBackend
from hqq.core.config import BaseQuantizeConfig
from hqq.core.linear import HQQLinear
from hqq.core.qtensor import QTensor
from hqq.kernels import dequantize_qtensor
from tests.cases import BITS, DTYPES
from tests.kernels.quantized import ALLOW_SCRIPT_METHOD, bits_of, random_qtensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize(
    ("shape", "group_size"),
    [((4096, 4096), 64), ((1031, 1024), 128), ((768, 3072), 48), ((2049, 515), None)],
    ids=["4096x4096", "1031x1024", "gs48", "channels"],
)
def test_large_layers(
    shape: tuple[int, int],
    group_size: int | None,
    quantised: bool,
    nbits: float,
    axis: int,
    dtype: torch.dtype,
    rng: torch.Generator,
    launches: list[Tensor],
) -> None:
    q = random_qtensor(
        rng,
        CUDA,
        nbits=nbits,
        shape=shape,
        group_size=group_size,
        axis=axis,
        dtype=dtype,
        quant_scale=quantised,
        quant_zero=quantised,
    )
    result, expected = dequantize_qtensor(q, dtype), q.dequantize(dtype)
    assert torch.equal(result.view(torch.int8), expected.view(torch.int8))
    assert len(launches) == 1


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("nbits", [8, 4, 3, 1])
def test_more_elements_than_32_bits_count(nbits: float, axis: int, seed: int) -> None:
    torch.cuda.empty_cache()
    shape = (2**16 + 64, 2**15)
    small = random_qtensor(
        torch.Generator().manual_seed(seed), CUDA, nbits=nbits, shape=(64, 8), axis=axis, dtype=torch.bfloat16
    )
    q = _on_gpu(small, shape, seed)
    result = dequantize_qtensor(q)
    # The reference needs many times the memory, so it is asked for stretches; the last rows are among them.
    for first in (0, shape[0] // 2, shape[0] - 64):
        rows = torch.arange(first, first + 64, device=CUDA)
        from hqq.core.embedding import gather_rows

        assert isinstance(q.scale, Tensor) and isinstance(q.zero, Tensor)
        assert torch.equal(result[first : first + 64], gather_rows(q.W_q, q.scale, q.zero, q.spec, rows))


def _on_gpu(like: QTensor, shape: tuple[int, int], seed: int) -> QTensor:
    """Return random codes of `shape`, drawn on the GPU, in the settings of `like`."""
    from hqq.core.qtensor import QSpec

    rng = torch.Generator(CUDA).manual_seed(seed)
    spec = QSpec(like.spec.nbits, shape, like.spec.group_size, like.spec.axis, like.spec.packing)
    fmt = spec.format
    assert fmt is not None
    top = 256 if fmt.dtype == torch.uint8 else 2**30
    W_q = torch.randint(0, top, spec.packed_shape, generator=rng, device=CUDA, dtype=fmt.dtype)
    stats = [
        torch.rand(spec.grouping.stat_shape, generator=rng, device=CUDA).bfloat16() + 0.5 for _ in range(2)
    ]
    return QTensor(W_q, stats[0], stats[1], spec)


def test_graph_capture_replays_on_new_codes(rng: torch.Generator) -> None:
    q = random_qtensor(rng, CUDA, nbits=4, shape=(512, 512))
    dequantize_qtensor(q)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = dequantize_qtensor(q, autotune=True)
    fresh = random_qtensor(rng, CUDA, nbits=4, shape=(512, 512))
    q.W_q.copy_(fresh.W_q)
    result.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(bits_of(result), bits_of(q.dequantize()))


def test_two_streams_keep_to_their_own(rng: torch.Generator) -> None:
    tensors = [random_qtensor(rng, CUDA, nbits=b, shape=(4096, 4096)) for b in (4, 2)]
    expected = [q.dequantize() for q in tensors]
    streams = [torch.cuda.Stream() for _ in tensors]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], []]
    for _ in range(8):
        for q, stream, kept in zip(tensors, streams, results, strict=True):
            with torch.cuda.stream(stream):
                source = q.W_q.clone()  # on this stream: a launch on another one would read it too early
                kept.append(dequantize_qtensor(QTensor(source, q.scale, q.zero, q.spec)))
    torch.cuda.synchronize()
    for kept, right in zip(results, expected, strict=True):
        assert all(torch.equal(result, right) for result in kept)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_device_of_the_codes(rng: torch.Generator) -> None:
    q = random_qtensor(rng, torch.device("cuda:1"), nbits=4, shape=(256, 256))
    assert torch.cuda.current_device() == 0
    result = dequantize_qtensor(q)
    assert result.device == q.W_q.device
    assert torch.equal(bits_of(result), bits_of(q.dequantize()))
    assert torch.cuda.current_device() == 0


def test_tuning_measures_once_and_keeps_the_choice(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hqq.kernels import dequant_tune
    from hqq.kernels.tune_cache import cache_folder

    dequant_tune.forget()
    q = random_qtensor(rng, CUDA, nbits=4, shape=(1024, 1024))
    first = dequantize_qtensor(q, autotune=True)
    assert len(list(cache_folder().iterdir())) == 1
    dequant_tune.forget()
    monkeypatch.setattr(dequant_tune, "fastest", None)
    again = dequantize_qtensor(q, autotune=True)
    assert torch.equal(first, again)
    assert torch.equal(bits_of(first), bits_of(q.dequantize()))
    dequant_tune.forget()


def test_new_shape_starts_within_a_second(rng: torch.Generator) -> None:
    dequantize_qtensor(random_qtensor(rng, CUDA, nbits=8, shape=(64, 64)))
    q = random_qtensor(rng, CUDA, nbits=2, shape=(1536, 1000), group_size=40, dtype=torch.float32)
    torch.cuda.synchronize()
    start = time.perf_counter()
    dequantize_qtensor(q)
    torch.cuda.synchronize()
    assert time.perf_counter() - start < 1


@ALLOW_SCRIPT_METHOD
# Inductor records an empty graph of its own to set up a memory pool.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("quantised", [False, True])
def test_compiled_layer_is_one_graph(quantised: bool, rng: torch.Generator) -> None:
    linear = nn.Linear(512, 256, dtype=torch.bfloat16)
    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1, quant_scale=quantised, quant_zero=quantised)
    layer = HQQLinear(linear, config, compute_dtype=torch.bfloat16, device=CUDA)
    before = HQQLinear.backend
    try:
        HQQLinear.set_backend(HQQBackend.TRITON)
        x = torch.randn(4, 512, generator=rng).to(CUDA, torch.bfloat16)
        with torch.no_grad():
            expected = layer(x)
            compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
            for _ in range(3):
                result = compiled(x).clone()
            assert torch.equal(result, expected)
    finally:
        HQQLinear.set_backend(before)
