"""HQQLinear: how it is built, what callers of the original read, write and replace."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from hqq.core.backend import HQQBackend
from hqq.core.linear import HQQLinear
from hqq.core.quantizer import Quantizer
from hqq.errors import (
    ConfigError,
    DeviceFallbackWarning,
    DtypeError,
    HQQError,
    NotQuantizedError,
    ShapeError,
    WeightError,
)
from tests.core.layers import config, linear, quantized, same_state

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class TestBuilding:
    def test_holds_what_the_quantizer_gives(self, rng: torch.Generator) -> None:
        original = linear(rng)
        layer = HQQLinear(
            original, config(nbits=3), del_orig=False, compute_dtype=torch.bfloat16, device="cpu"
        )
        params = config(nbits=3)["weight_quant_params"]
        W_q, meta = Quantizer.quantize(original.weight.data, compute_dtype=torch.bfloat16, **params)
        assert torch.equal(layer.W_q, W_q)
        assert torch.equal(layer.scale, meta["scale"].bfloat16())
        assert torch.equal(layer.zero, meta["zero"].bfloat16())
        assert torch.equal(layer.bias, original.bias.bfloat16())

    @pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
    def test_device_forms(self, device: Any, rng: torch.Generator) -> None:
        layer = HQQLinear(linear(rng), config(), device=device)
        expected = "cuda" if device is None and torch.cuda.is_available() else "cpu"
        assert layer.device.type == layer.W_q.device.type == expected

    @pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
    @pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda", 1)])
    def test_cuda_without_a_gpu_becomes_the_cpu_and_says_so(self, device: Any, rng: torch.Generator) -> None:
        with pytest.warns(DeviceFallbackWarning, match="no usable CUDA device; using the CPU"):
            layer = HQQLinear(linear(rng), config(), device=device)
        assert layer.device.type == "cpu"
        assert not layer.in_gpu
        assert layer(torch.ones(1, 64, dtype=torch.float16)).shape == (1, 24)

    def test_positional_arguments_are_in_the_originals_order(self, rng: torch.Generator) -> None:
        original = linear(rng)
        layer = HQQLinear(original, config(), False, torch.float32, "cpu", False)
        assert not layer.ready
        assert layer.linear_layer is original
        assert layer.compute_dtype == torch.float32
        assert layer.del_orig is False

    def test_empty_needs_no_config_and_no_device(self) -> None:
        layer = HQQLinear(None, None)
        assert not layer.ready
        assert not layer.is_initialized()
        assert (layer.W_q, layer.meta, layer.bias, layer.quant_config) == (None, None, None, None)
        assert (layer.in_features, layer.out_features, layer.axis, layer.channel_wise) == (
            None,
            None,
            None,
            None,
        )
        assert layer.unpack() is None
        for use in (
            layer.dequantize,
            lambda: layer(torch.ones(1, 4)),
            layer.qtensor,
            lambda: layer.matmul(torch.ones(1, 4)),
        ):
            with pytest.raises(
                NotQuantizedError, match=r"call initialize\(\), quantize\(W, \*\*quant_config\)"
            ):
                use()

    def test_the_attributes(self, rng: torch.Generator) -> None:
        layer = quantized(rng, nbits=2, axis=0)
        assert type(layer).__name__ == "HQQLinear"
        assert hasattr(layer, "W_q")
        assert isinstance(layer.W_q, nn.Parameter)
        assert not layer.W_q.requires_grad
        assert layer.ready
        assert layer.in_gpu is False
        assert (layer.in_features, layer.out_features) == (64, 24)
        assert (layer.axis, layer.channel_wise, layer.del_orig) == (0, True, True)
        assert layer.encoded_state_dict is True
        assert layer.offload_meta is False
        assert layer.backend is HQQLinear.backend
        layer.name = "model.layers.0.mlp.up_proj"
        assert layer.name == "model.layers.0.mlp.up_proj"

    def test_quant_config_has_exactly_three_sections(self, rng: torch.Generator) -> None:
        given = config(offload_meta=True, quant_zero=True)
        before = copy.deepcopy(given)
        layer = HQQLinear(linear(rng), given, device="cpu")
        assert given == before
        assert layer.quant_config is not None
        assert set(layer.quant_config) == {"weight_quant_params", "scale_quant_params", "zero_quant_params"}
        assert json.loads(json.dumps(layer.quant_config)) == layer.quant_config
        assert layer.offload_meta is True

    @pytest.mark.parametrize("axis", [0, 1])
    def test_whole_channels(self, axis: int, rng: torch.Generator) -> None:
        layer = quantized(rng, group_size=None, axis=axis)
        groups = 24 if axis == 1 else 64
        assert layer.scale.numel() == layer.zero.numel() == groups
        assert layer.meta["group_size"] == (64 if axis == 1 else 24)

    def test_one_scale_for_the_whole_weight(self, rng: torch.Generator) -> None:
        original = linear(rng)
        for group_size in (None, 32):
            nested = config(nbits=8, group_size=group_size)
            nested["weight_quant_params"]["channel_wise"] = False
            layer = HQQLinear(original, nested, False, torch.float32, "cpu")
            assert layer.scale.numel() == 1
            assert layer.channel_wise is False
            step = float((original.weight.max() - original.weight.min()).detach()) / 255
            assert float((layer.dequantize() - original.weight.detach()).abs().max()) <= step * 0.51
            copied = HQQLinear(None, None, compute_dtype=torch.float32)
            copied.load_state_dict(layer.state_dict())
            assert torch.equal(copied.dequantize(), layer.dequantize())

    def test_from_weights(self, rng: torch.Generator) -> None:
        original = linear(rng)
        expected = HQQLinear(original, config(), False, torch.float32, "cpu")
        made = HQQLinear.from_weights(original.weight, original.bias, config(), torch.float32, "cpu")
        assert same_state(made.state_dict(), expected.state_dict())
        assert HQQLinear.from_weights(original.weight, None, config(), device="cpu").bias is None
        assert original.weight.requires_grad

    def test_any_module_with_a_weight_will_do(self, rng: torch.Generator) -> None:
        class Projection(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(8, 32, generator=rng))

        layer = HQQLinear(Projection(), config(), compute_dtype=torch.float32, device="cpu")
        assert (layer.out_features, layer.in_features, layer.bias) == (8, 32, None)


class TestTheOriginalLayer:
    def test_del_orig_false_leaves_it_untouched(self, rng: torch.Generator) -> None:
        original = linear(rng)
        weight, bias, values = original.weight, original.bias, original.weight.detach().clone()
        layer = HQQLinear(original, config(), del_orig=False, compute_dtype=torch.float16, device="cpu")
        assert original.weight is weight
        assert original.bias is bias
        assert weight.requires_grad
        assert torch.equal(weight, values)
        assert weight.dtype == torch.float32
        assert layer.linear_layer is original
        assert not any(key.startswith("linear_layer") for key in layer.state_dict())
        layer.bias.data.zero_()
        assert bool(bias.any())

    def test_del_orig_drops_its_parameters(self, rng: torch.Generator) -> None:
        original = linear(rng)
        layer = HQQLinear(original, config(), device="cpu")
        assert original.weight is None
        assert original.bias is None
        assert layer.linear_layer is None

    def test_is_as_it_was_when_quantising_fails(self, rng: torch.Generator) -> None:
        original = linear(rng)
        original.weight.data[3, 4] = float("nan")
        weight, bias = original.weight, original.bias
        with pytest.raises(WeightError, match="NaN or infinite"):
            HQQLinear(original, config(), device="cpu")
        assert original.weight is weight
        assert original.bias is bias

    def test_initialize_later(self, rng: torch.Generator) -> None:
        original = linear(rng)
        now = HQQLinear(original, config(), False, torch.float32, "cpu")
        later = HQQLinear(original, config(), True, torch.float32, "cpu", initialize=False)
        assert (later.in_features, later.out_features) == (64, 24)
        assert not later.ready
        later.initialize()
        assert later.ready
        assert same_state(later.state_dict(), now.state_dict())
        W_q = later.W_q
        later.initialize()
        assert later.W_q is W_q

    def test_casts_and_moves_before_initialize_count(self, rng: torch.Generator) -> None:
        later = HQQLinear(linear(rng), config(), device="cpu", initialize=False).to(torch.bfloat16)
        later.initialize()
        assert later.compute_dtype == later.scale.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"nbits": 7}, ConfigError, "got nbits=7"),
        ({"axis": 3}, ConfigError, "got axis=3"),
        ({"group_size": 48}, ConfigError, "group_size=48 does not divide the 1600 elements"),
        ({"group_size": 7}, ConfigError, "group_size=7 does not divide the 1536 elements"),
        ({"solver": "magic"}, ConfigError, "got solver='magic'"),
        ({"surprise": 1}, ConfigError, r"unknown \['surprise'\]"),
    ],
)
def test_bad_settings(
    change: dict[str, Any], error: type[HQQError], message: str, rng: torch.Generator
) -> None:
    nested = config()
    nested["weight_quant_params"].update(change)
    original = linear(rng, out=24, in_=64)
    if change == {"group_size": 48}:
        original = linear(rng, out=25, in_=64)
    weight = original.weight
    with pytest.raises(error, match=message):
        HQQLinear(original, nested, device="cpu")
    assert original.weight is weight


def test_bad_arguments(rng: torch.Generator) -> None:
    with pytest.raises(
        ConfigError, match=r"got quant_config=None with a layer to quantise; pass BaseQuantizeConfig"
    ):
        HQQLinear(linear(rng), None, device="cpu")
    with pytest.raises(DtypeError, match=r"got compute_dtype=torch\.int8; expected one of torch\.float16"):
        HQQLinear(linear(rng), config(), compute_dtype=torch.int8, device="cpu")
    with pytest.raises(ShapeError, match=r"got a weight of shape \(2, 3, 64\); expected two dimensions"):
        HQQLinear(None, None).quantize(torch.ones(2, 3, 64), {"nbits": 4, "group_size": 64})
    with pytest.raises(ShapeError, match="got an empty weight"):
        HQQLinear.from_weights(torch.empty(4, 0), None, config(), device="cpu")
    with pytest.raises(WeightError, match="meta device"):
        HQQLinear(nn.Linear(64, 4, device="meta"), config(), device="cpu")


def test_a_failed_quantize_leaves_the_layer(rng: torch.Generator) -> None:
    layer = quantized(rng)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(WeightError):
        layer.quantize(torch.full((24, 64), float("inf")), {"nbits": 2, "group_size": 64})
    assert same_state(layer.state_dict(), before)
    assert layer.quant_config["weight_quant_params"]["nbits"] == 4


class TestPeftMerge:
    """PEFT builds an empty layer from quant_config and offload_meta, and quantises the merged weight into it."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize(
        "options", [{}, {"quant_zero": True, "quant_scale": True}, {"view_as_float": True}], ids=str
    )
    def test_merge(self, options: dict[str, Any], dtype: torch.dtype, rng: torch.Generator) -> None:
        layer = quantized(rng, dtype, **options)
        merged_weight = (layer.dequantize().float() + 0.01).requires_grad_(True)
        quant_config = {**copy.deepcopy(layer.quant_config), "offload_meta": layer.offload_meta}
        merged = HQQLinear(None, quant_config, compute_dtype=layer.compute_dtype, device=layer.device)
        quant_config.pop("offload_meta", None)
        merged.quantize(merged_weight, **quant_config)
        assert merged.ready
        assert merged.quant_config == layer.quant_config
        assert (merged.in_features, merged.out_features) == (64, 24)
        assert merged.compute_dtype == dtype
        assert merged_weight.requires_grad
        direct = HQQLinear.from_weights(merged_weight, None, layer.quant_config, dtype, "cpu")
        assert torch.equal(merged.dequantize(), direct.dequantize())
        assert merged(torch.ones(2, 64, dtype=dtype)).shape == (2, 24)


class TestWeight:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_is_empty_of_the_compute_dtype(self, dtype: torch.dtype, rng: torch.Generator) -> None:
        layer = quantized(rng, dtype)
        assert layer.weight.dtype == dtype
        assert layer.weight.shape == (0,)
        assert len(layer.weight) == 0
        assert layer.weight.device == layer.W_q.device

    def test_assignment_is_swallowed(self, rng: torch.Generator) -> None:
        layer = quantized(rng)
        before = copy.deepcopy(layer.state_dict())
        for value in (None, torch.ones(3), nn.Parameter(torch.ones(24, 64))):
            layer.weight = value
            assert layer.weight.numel() == 0
        assert same_state(layer.state_dict(), before)
        assert "weight" not in dict(layer.named_parameters())

    def test_the_class_takes_another_property_and_gives_it_back(self, rng: torch.Generator) -> None:
        layer = quantized(rng, torch.bfloat16)
        own = HQQLinear.__dict__.get("weight")
        setattr(HQQLinear, "weight", property(lambda self: torch.empty(0, dtype=torch.float64)))  # noqa: B010
        try:
            assert layer.weight.dtype == torch.float64
            layer.weight = torch.ones(1)
            assert layer(torch.ones(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
        finally:
            if own is None:
                del HQQLinear.weight
            else:
                HQQLinear.weight = own  # type: ignore[method-assign]
        assert layer.weight.dtype == torch.bfloat16


class TestMeta:
    KEYS = frozenset(
        [
            "nbits",
            "group_size",
            "shape",
            "scale",
            "zero",
            "axis",
            "packing",
            "unpack_view_dtype",
            "view_as_float",
            "quant_scale",
            "quant_zero",
            "compute_dtype",
        ]
    )

    def test_keys_and_values(self, rng: torch.Generator) -> None:
        layer = quantized(rng, torch.bfloat16, nbits=3, axis=0)
        meta = layer.meta
        assert set(meta) == set(self.KEYS)
        assert len(meta) == len(self.KEYS)
        assert (meta["nbits"], meta["group_size"], meta["axis"]) == (3, 32, 0)
        assert meta["shape"] == torch.Size([24, 64])
        assert (meta["packing"], meta["unpack_view_dtype"]) == ("3bit_32", torch.int32)
        assert (meta["view_as_float"], meta["quant_scale"], meta["quant_zero"]) == (False, False, False)
        assert meta["compute_dtype"] == torch.bfloat16
        assert meta["scale"] is layer.scale
        assert meta.get("nothing") is None
        assert "nothing" not in meta

    def test_writes_go_through(self, rng: torch.Generator) -> None:
        layer = quantized(rng)
        meta = layer.meta
        before = layer.dequantize()
        meta["scale"] = meta["scale"] * 2
        assert torch.equal(layer.dequantize(), before * 2)
        meta["zero"].sub_(1.0)
        assert torch.equal(
            layer.dequantize(), (layer.unpack(reshape=False) - layer.zero).mul(layer.scale).view(24, 64)
        )
        meta.update(scale=torch.zeros_like(meta["scale"]))
        assert not layer.dequantize().any()

    def test_other_keys_are_kept(self, rng: torch.Generator) -> None:
        layer = quantized(rng)
        layer.meta["scale_buffer"] = 7
        layer.meta["scale"] = layer.meta["scale"]
        assert layer.meta["scale_buffer"] == 7
        assert layer.meta.pop("scale_buffer") == 7
        assert set(layer.meta) == set(self.KEYS)
        with pytest.raises(KeyError):
            del layer.meta["nbits"]

    def test_compute_dtype_casts(self, rng: torch.Generator) -> None:
        layer = quantized(rng)
        layer.meta["compute_dtype"] = torch.float16
        assert (
            layer.compute_dtype
            == layer.scale.dtype
            == layer.bias.dtype
            == layer.dequantize().dtype
            == torch.float16
        )
        layer.compute_dtype = torch.bfloat16
        assert layer.meta["compute_dtype"] == layer.scale.dtype == torch.bfloat16

    def test_a_value_that_does_not_fit_changes_nothing(self, rng: torch.Generator) -> None:
        layer = quantized(rng)
        before = copy.deepcopy(layer.state_dict())
        for key, value in {"scale": torch.ones(3, 1), "nbits": 7, "shape": (3, 3), "packing": "?"}.items():
            with pytest.raises(HQQError):
                layer.meta[key] = value
        assert same_state(layer.state_dict(), before)

    def test_none_and_back(self, rng: torch.Generator) -> None:
        layer = quantized(rng)
        before, state = layer.dequantize(), copy.deepcopy(layer.state_dict())
        W_q, meta, bias = layer.W_q, layer.meta, layer.bias
        layer.W_q = layer.meta = layer.bias = None
        assert not layer.ready
        assert (layer.W_q, layer.meta, layer.bias, layer.scale) == (None, None, None, None)
        assert meta["nbits"] == 4  # what the caller kept is still there
        layer.W_q, layer.meta, layer.bias = W_q, meta, bias
        assert torch.equal(layer.dequantize(), before)
        assert same_state(layer.state_dict(), state)
        layer.meta["nbits"] = 4
        assert meta["nbits"] == 4

    @pytest.mark.parametrize("order", [("meta", "W_q"), ("W_q", "meta")])
    @pytest.mark.parametrize("options", [{}, {"quant_zero": True, "quant_scale": True}], ids=str)
    def test_another_layers_tensors_in_either_order(
        self, options: dict[str, Any], order: tuple[str, str], rng: torch.Generator
    ) -> None:
        source = quantized(rng, nbits=2, axis=0, **options)
        target = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu")
        for name in order:
            setattr(target, name, getattr(source, name))
        assert torch.equal(target.dequantize(), source.dequantize())

    def test_tensors_become_parameters_without_gradient(self, rng: torch.Generator) -> None:
        layer = quantized(rng)
        layer.W_q = layer.W_q.data.clone()
        layer.bias = torch.ones(24, requires_grad=True)
        for parameter in (layer.W_q, layer.bias):
            assert isinstance(parameter, nn.Parameter)
            assert not parameter.requires_grad
        given = nn.Parameter(torch.zeros(24))
        layer.bias = given
        assert layer.bias is given

    def test_copies_are_dicts(self, rng: torch.Generator) -> None:
        layer = quantized(rng)
        copied = copy.deepcopy(layer.meta)
        assert type(copied) is dict
        copied["scale"].zero_()
        assert bool(layer.scale.any())
        assert type(layer.meta.copy()) is dict
        assert type(pickle.loads(pickle.dumps(layer.meta))) is dict
        assert repr(layer.meta).startswith("MetaView({'nbits': 4")


class TestUnpack:
    @pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
    def test_forms(self, nbits: int, rng: torch.Generator) -> None:
        layer = quantized(rng, torch.bfloat16, nbits=nbits)
        assert layer.unpack().shape == (48, 32)
        assert layer.unpack().dtype == torch.bfloat16
        assert layer.unpack(reshape=True).shape == (24, 64)
        codes = layer.unpack(dtype=torch.uint8)
        assert codes.dtype == torch.uint8
        assert int(codes.max()) < 2**nbits
        assert torch.equal(codes.view(24, 64), layer.unpack(reshape=True, dtype=torch.uint8))
        expected = (layer.unpack() - layer.meta["zero"]) * layer.meta["scale"]
        assert torch.equal(layer.dequantize(), expected.view(layer.meta["shape"]))

    def test_gemlites_way_in(self, rng: torch.Generator) -> None:
        layer = quantized(rng, torch.float16)
        W_q = layer.unpack(dtype=torch.uint8).view(layer.meta["shape"])
        assert W_q.shape == (layer.out_features, layer.in_features)
        assert layer.bias.dtype == torch.float16
        layer.weight = layer.bias = layer.W_q = layer.meta = None
        assert not layer.ready


def test_instance_forward_may_be_overridden(rng: torch.Generator) -> None:
    layer = quantized(rng)
    layer.forward = lambda x: layer.matmul(x) * 2  # type: ignore[method-assign]
    x = torch.randn(2, 64, generator=rng)
    assert torch.equal(layer(x), (x @ layer.dequantize().t()) * 2)


def test_repr_says_what_matters_and_no_more(rng: torch.Generator) -> None:
    assert repr(quantized(rng)) == (
        "HQQLinear(in_features=64, out_features=24, bias=True, nbits=4, group_size=32, axis=1)"
    )
    assert repr(HQQLinear(None, None)) == "HQQLinear(not quantised)"


def test_the_backend_is_a_choice_of_the_class(rng: torch.Generator) -> None:
    layer = quantized(rng)
    previous = HQQLinear.backend
    try:
        HQQLinear.set_backend(HQQBackend.PYTORCH_COMPILE)
        assert layer.selection().asked == "pytorch_compile"
    finally:
        HQQLinear.set_backend(previous)
    assert layer.selection().asked == previous.value
