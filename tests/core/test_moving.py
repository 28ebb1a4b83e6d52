"""Casts, moves, copies: the nn.Module protocol on quantised layers. Codes never change."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hqq.core.embedding import HQQEmbedding
from hqq.core.linear import HQQLinear
from hqq.errors import DtypeError
from tests.core.layers import config, linear, quantized, same_state

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"nbits": 3, "axis": 0},
    {"nbits": 8, "view_as_float": True},
    {"nbits": 3, "view_as_float": True},
    {"quant_zero": True},
    {"quant_zero": True, "quant_scale": True},
)
CASTS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "float": (lambda m: m.float(), torch.float32),
    "double": (lambda m: m.double(), torch.float64),
    "to(dtype)": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to(device, dtype)": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "to(tensor)": (lambda m: m.to(torch.ones(1, dtype=torch.float64)), torch.float64),
    "type": (lambda m: m.type(torch.float16), torch.float16),
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("start", [torch.float32, torch.bfloat16], ids=str)
def test_casts(start: torch.dtype, cast: str, options: dict[str, Any], rng: torch.Generator) -> None:
    layer = quantized(rng, start, **options)
    codes, W_q = layer.unpack(dtype=torch.uint8), layer.W_q
    weight = layer.dequantize()
    apply, dtype = CASTS[cast]
    assert apply(layer) is layer
    assert layer.W_q is W_q
    assert torch.equal(layer.unpack(dtype=torch.uint8), codes)
    assert (
        layer.compute_dtype == layer.meta["compute_dtype"] == layer.weight.dtype == layer.bias.dtype == dtype
    )
    assert layer.dequantize().dtype == dtype
    assert layer(torch.ones(2, 64, dtype=dtype)).dtype == dtype
    # scale, zero, difference and product rounded in the coarser of the two dtypes; zero is at most the largest code
    u = max(torch.finfo(dtype).eps, torch.finfo(start).eps)
    reach = 8 * u * (float(weight.abs().max()) + float(weight.max() - weight.min()))
    if "quant_zero" in options:
        reach *= 20  # one step of the zero's 255 spans every group's zero
    assert float((layer.dequantize().double() - weight.double()).abs().max()) <= reach


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_cast_there_and_back_up_is_lossless(options: dict[str, Any], rng: torch.Generator) -> None:
    layer = quantized(rng, torch.bfloat16, **options)
    before = copy.deepcopy(layer.state_dict())
    layer.double().bfloat16()
    assert same_state(layer.state_dict(), before)


def test_a_cast_model_runs(rng: torch.Generator) -> None:
    """The original ends in a dtype mismatch here."""
    model = nn.Sequential(linear(rng, 64, 64), quantized(rng, torch.float32), nn.LayerNorm(24))
    y = model.to(torch.bfloat16)(torch.ones(2, 64, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert bool(y.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_casts_to_dtypes_that_do_not_compute_are_refused(dtype: torch.dtype, rng: torch.Generator) -> None:
    layer = quantized(rng)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(DtypeError, match=f"got compute_dtype={dtype}"):
        layer.to(dtype)
    with pytest.raises(TypeError):
        layer.to(torch.int8)
    assert same_state(layer.state_dict(), before)
    assert layer.compute_dtype == torch.float32


def test_an_empty_layer_remembers_its_casts(rng: torch.Generator) -> None:
    layer = HQQLinear(None, None).to(torch.bfloat16)
    assert layer.compute_dtype == torch.bfloat16
    layer.load_state_dict(quantized(rng, torch.bfloat16).state_dict())
    assert layer.scale.dtype == torch.bfloat16
    layer = HQQLinear(None, None, device="cpu").to("meta")
    assert layer.device.type == "meta"


class TestDevices:
    @pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
    def test_cuda_takes_any_device(self, device: Any, rng: torch.Generator) -> None:
        layer = quantized(rng)
        assert layer.cuda(device) is layer
        assert layer.cpu() is layer
        assert layer.device.type == "cpu"

    def test_cuda_with_a_dtype_is_no_move(self, rng: torch.Generator) -> None:
        layer = quantized(rng)
        before = copy.deepcopy(layer.state_dict())
        assert layer.cuda(torch.float16) is layer
        assert same_state(layer.state_dict(), before)

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_meta_device(self, options: dict[str, Any], rng: torch.Generator) -> None:
        layer = quantized(rng, torch.bfloat16, **options)
        shape, dtype = layer.W_q.shape, layer.W_q.dtype
        layer.to("meta")
        assert layer.device.type == layer.W_q.device.type == layer.bias.device.type == "meta"
        assert (layer.W_q.shape, layer.W_q.dtype) == (shape, dtype)
        assert layer.compute_dtype == torch.bfloat16
        assert layer.dequantize().shape == (24, 64)
        assert layer(torch.ones(3, 64, dtype=torch.bfloat16, device="meta")).shape == (3, 24)

    def test_from_meta_to_empty_and_loaded(self, rng: torch.Generator) -> None:
        layer = quantized(rng)
        state = copy.deepcopy(layer.state_dict())
        layer.to("meta").to_empty(device="cpu")
        assert layer.device.type == "cpu"
        layer.load_state_dict(state)
        assert same_state(layer.state_dict(), state)

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_every_tensor_moves(self, options: dict[str, Any], rng: torch.Generator) -> None:
        layer = quantized(rng, **options).to("meta")
        tensors = [*layer.parameters(), *layer.buffers()]
        assert len(tensors) >= 4
        assert {tensor.device.type for tensor in tensors} == {"meta"}

    def test_w_q_on_another_device_alone(self, rng: torch.Generator) -> None:
        """fsdp_qlora re-assigns W_q on cpu or meta."""
        layer = quantized(rng)
        kept = layer.W_q
        layer.W_q = nn.Parameter(layer.W_q.to("meta"), requires_grad=False)
        assert layer.device.type == "meta"
        layer.W_q = kept
        assert layer(torch.ones(1, 64)).shape == (1, 24)


class TestCopies:
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_are_equal_and_independent(self, how: str, options: dict[str, Any], rng: torch.Generator) -> None:
        layer = quantized(rng, torch.bfloat16, **options)
        meta = layer.meta  # a live view must not get in the way
        layer(torch.ones(1, 64, dtype=torch.bfloat16))
        if how == "deepcopy":
            other = copy.deepcopy(layer)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(layer))
        else:
            file = io.BytesIO()
            torch.save(layer, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert type(other) is HQQLinear
        assert same_state(other.state_dict(), layer.state_dict())
        assert torch.equal(other.dequantize(), layer.dequantize())
        before = layer.dequantize()
        other.W_q.data.zero_()
        other.bias.data.zero_()
        other.meta["nbits"] = other.meta["nbits"]
        other.to(torch.float32)
        assert torch.equal(layer.dequantize(), before)
        assert bool(layer.bias.any())
        assert layer.compute_dtype == meta["compute_dtype"] == torch.bfloat16

    def test_empty_and_waiting_layers(self, rng: torch.Generator) -> None:
        assert not copy.deepcopy(HQQLinear(None, None)).ready
        waiting = copy.deepcopy(HQQLinear(linear(rng), config(), device="cpu", initialize=False))
        waiting.initialize()
        assert waiting.ready

    def test_with_the_original_kept(self, rng: torch.Generator) -> None:
        layer = HQQLinear(linear(rng), config(), del_orig=False, device="cpu")
        other = copy.deepcopy(layer)
        assert other.linear_layer is not layer.linear_layer
        assert torch.equal(other.linear_layer.weight, layer.linear_layer.weight)


@pytest.mark.parametrize("options", [{}, {"view_as_float": True, "nbits": 8}], ids=str)
def test_tied_codes_stay_shared_through_casts_and_copies(
    options: dict[str, Any], rng: torch.Generator
) -> None:
    head = quantized(rng, torch.float32, bias=False, **options)
    model = nn.ModuleDict({"embed": HQQEmbedding.sharing(head), "head": head})
    model.to(torch.bfloat16)
    assert model["embed"].W_q is model["head"].W_q
    copied = copy.deepcopy(model)
    assert copied["embed"].W_q is copied["head"].W_q
    rows = model["embed"](torch.arange(24))
    assert torch.equal(rows, model["head"].dequantize())
