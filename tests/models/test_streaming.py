"""Weights that are copied to the GPU ahead of their turn. Most of it needs a GPU; the CPU must not notice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hqq.core.config import QuantConfig
from hqq.core.linear import HQQLinear
from hqq.errors import WeightError
from hqq.models import streaming
from hqq.models.quantize import quantize_model
from hqq.models.streaming import WeightStream, on_device

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_nothing_happens_on_the_cpu() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    place = weight.data_ptr()
    with WeightStream() as stream:
        stream.prepare(weight, torch.device("cpu"))
        assert stream.take(weight) is weight
        stream.prepare(weight, None)
        with on_device(stream, weight):
            assert weight.data_ptr() == place
    assert weight.data_ptr() == place


def test_an_error_puts_the_weight_back() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    place = weight.data_ptr()

    class Prepared(WeightStream):
        def take(self, weight: torch.Tensor) -> torch.Tensor:
            return weight.detach().clone()

    def fail(stream: WeightStream) -> None:
        with on_device(stream, weight):
            assert weight.data_ptr() != place
            raise KeyError

    with Prepared() as stream, pytest.raises(KeyError):
        fail(stream)
    assert weight.data_ptr() == place


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ahead", [1, 3])
def test_copies_arrive_whole_and_in_order(
    ahead: int, pinned: bool, dtype: torch.dtype, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_STAGED_BYTES", 1 << 16)
    device = torch.device("cuda", 0)
    shapes = [(1000, 333), (7, 5), (512, 512), (3000, 100), (1, 1)]
    weights = [torch.randn(shape, generator=rng).to(dtype) for shape in shapes]
    weights.append(weights[0].t())  # not contiguous
    if pinned:
        weights = [w.pin_memory() for w in weights]
    with WeightStream() as stream:
        stream.prepare(weights[0], device)
        for k, weight in enumerate(weights):
            copy = stream.take(weight)
            for later in weights[k + 1 : k + 1 + ahead]:
                stream.prepare(later, device)
            assert copy.device == device
            assert torch.equal(copy.cpu(), weight)
        stream.prepare(weights[0], device)  # never taken


def model_of(count: int, size: int, dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(size, size, bias=False, dtype=dtype) for _ in range(count)))


@pytest.mark.gpu
@needs_gpu
def test_models_come_out_as_if_layers_were_moved_one_by_one() -> None:
    model = model_of(5, 512)
    config = QuantConfig(nbits=4, group_size=64, axis=1)
    alone = [
        HQQLinear(layer, config.to_dict(), del_orig=False, compute_dtype=torch.bfloat16, device="cuda")
        for layer in model
        if isinstance(layer, nn.Linear)
    ]
    quantize_model(model, config, device="cuda", progress=False)
    for layer, expected in zip(model, alone, strict=True):
        assert isinstance(layer, HQQLinear)
        assert layer.W_q is not None and expected.W_q is not None
        assert torch.equal(layer.W_q, expected.W_q)
        assert torch.equal(layer.dequantize(), expected.dequantize())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("ahead", [0, 2])
def test_memory_stays_within_what_may_be_ahead(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2048
    monkeypatch.setattr(streaming, "_AHEAD_BYTES", ahead * size * size * 2)
    model = model_of(8, size)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    quantize_model(model, QuantConfig(nbits=4, group_size=64, axis=1), device="cuda", progress=False)
    kept = torch.cuda.memory_allocated() - before
    layer = size * size * 2
    # This layer, those ahead, one of them in any case, and what solving needs: codes and five numbers for each group.
    assert torch.cuda.max_memory_allocated() - before <= kept + (2 + max(ahead, 1)) * layer


@pytest.mark.gpu
@needs_gpu
def test_a_bad_weight_is_named_and_left_on_the_cpu() -> None:
    model = model_of(4, 256)
    with torch.no_grad():
        model[2].weight[3, 5] = float("nan")  # type: ignore[union-attr, operator, index]
    with pytest.raises(WeightError, match="2"):
        quantize_model(model, QuantConfig(nbits=4, group_size=64, axis=1), device="cuda", progress=False)
    assert isinstance(model[2], nn.Linear)
    assert model[2].weight.device.type == "cpu"
