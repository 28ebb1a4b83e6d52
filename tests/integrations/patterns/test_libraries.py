"""How gemlite, torchao and others read an HQQLinear, replayed; and torchao's own code where it is installed."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from hqq.backends.gemlite import patch_hqq_to_gemlite
from hqq.backends.torchao import patch_hqq_to_aoint4
from hqq.core.lora import HQQLinearLoRA
from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear, Quantizer
from hqq.errors import BackendError

N, K = 32, 128


def layer(
    rng: torch.Generator, nbits: int = 4, axis: int = 1, dtype: torch.dtype = torch.float32
) -> HQQLinear:
    linear = nn.Linear(K, N)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    config = BaseQuantizeConfig(nbits=nbits, group_size=64, axis=axis)
    return HQQLinear(linear, config, compute_dtype=dtype, device="cpu")


class Reader(nn.Module):
    """As gemlite's processors take a layer: reads, clones, and empties what was read."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.asked_for = device

    def from_hqqlinear(self, source: HQQLinear) -> Reader:
        meta: Any = source.meta
        assert meta["axis"] == 1
        self.group_size = source.in_features if meta["group_size"] is None else meta["group_size"]
        codes: Any = source.unpack(dtype=torch.uint8)
        self.codes, self.scale, self.zero = (
            codes.view(meta["shape"]),
            meta["scale"].clone(),
            meta["zero"].clone(),
        )
        self.bias = source.bias.clone() if source.bias is not None else None
        for name in ("weight", "bias", "weight_scale", "W_q", "meta"):
            value = getattr(source, name, None)
            if value is not None and hasattr(value, "__len__") and len(value) > 0:
                setattr(source, name, None)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        W = (self.codes.view(-1, self.group_size) - self.zero) * self.scale
        return x @ W.view(self.codes.shape).t() + self.bias


@pytest.fixture
def gemlite(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in: gemlite itself cannot be imported without a GPU."""
    package, helper = types.ModuleType("gemlite"), types.ModuleType("gemlite.helper")
    helper.A16Wn = Reader  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gemlite", package)
    monkeypatch.setitem(sys.modules, "gemlite.helper", helper)


@pytest.mark.parametrize("nbits", [8, 4, 2, 1])
def test_gemlite_takes_a_layer(gemlite: None, nbits: int, rng: torch.Generator) -> None:
    source = layer(rng, nbits)
    x = torch.randn(3, K, generator=rng)
    expected = source(x)
    new = patch_hqq_to_gemlite(source, None)
    assert isinstance(new, Reader) and new.asked_for == "cpu"
    # float32 sums of K products in another order.
    torch.testing.assert_close(
        new(x), expected, rtol=K * 2**-23, atol=K * 2**-23 * float(expected.abs().max())
    )
    assert source.W_q is None and source.meta is None and source.bias is None and not source.ready


def test_gemlite_inside_an_adapter(gemlite: None, rng: torch.Generator) -> None:
    adapter = HQQLinearLoRA(layer(rng), {"r": 4, "lora_alpha": 4, "train_dtype": torch.float32})
    assert patch_hqq_to_gemlite(adapter, None) is adapter
    assert isinstance(adapter.linear_layer, Reader)
    other = nn.ReLU()
    assert patch_hqq_to_gemlite(other, None) is other


def test_gemlite_refuses_before_anything_is_changed(gemlite: None, rng: torch.Generator) -> None:
    for source, message in ((layer(rng, axis=0), "axis=0"), (layer(rng, nbits=3), "3 bits")):
        with pytest.raises(BackendError, match=message):
            patch_hqq_to_gemlite(source, None)
        assert source.ready


@pytest.mark.parametrize(
    ("patch", "module"),
    [(patch_hqq_to_gemlite, "gemlite"), (patch_hqq_to_aoint4, "torchao")],
    ids=["gemlite", "torchao"],
)
def test_missing_library_is_named(patch: Any, module: str, rng: torch.Generator, monkeypatch: Any) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    source = layer(rng)
    with pytest.raises(BackendError, match=f"pip install {module}"):
        patch(source, None)
    assert source.ready


@pytest.mark.filterwarnings("default")  # what torchao warns of is its own
class TestTorchao:
    """torchao's own HQQ layer: it quantises with `Quantizer`, or takes codes and meta."""

    @pytest.fixture
    def layer_class(self) -> Any:
        module = pytest.importorskip(
            "torchao.prototype.hqq.hqq_tinygemm_linear",
            reason="torchao is not installed",
            exc_type=ImportError,
        )
        return module.HQQLinearTorchWeightOnlyInt4

    def linear(self, rng: torch.Generator) -> nn.Linear:
        linear = nn.Linear(1024, 64, dtype=torch.bfloat16)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(64, 1024, generator=rng) / 32)
        return linear

    def test_quantises_through_us(self, layer_class: Any, rng: torch.Generator) -> None:
        linear = self.linear(rng)
        config = BaseQuantizeConfig(nbits=4, group_size=64)
        ours = HQQLinear(linear, config, False, torch.bfloat16, "cpu")
        theirs = layer_class(linear, config, False, torch.bfloat16, "cpu")
        x = torch.randn(3, 1024, generator=rng).bfloat16()
        difference = (theirs(x) - ours(x)).norm() / ours(x).norm()
        assert difference < 2**-6  # bfloat16 scale, zero and output, each rounded in another place

    def test_takes_our_layer(self, layer_class: Any, rng: torch.Generator) -> None:
        config = BaseQuantizeConfig(nbits=4, group_size=64)
        ours = HQQLinear(self.linear(rng), config, compute_dtype=torch.bfloat16, device="cpu")
        x = torch.randn(3, 1024, generator=rng).bfloat16()
        expected = ours(x)
        new = patch_hqq_to_aoint4(ours, None)
        assert isinstance(new, layer_class)
        assert (new(x) - expected).norm() / expected.norm() < 2**-6
        assert not ours.ready

    def test_refuses_what_the_kernels_do_not_take(self, layer_class: Any, rng: torch.Generator) -> None:
        source = layer(rng, nbits=2)
        with pytest.raises(BackendError, match=r"2 bits, torch\.float32"):
            patch_hqq_to_aoint4(source, None)
        assert source.ready


def test_torchaos_calls_of_the_quantizer(rng: torch.Generator) -> None:
    """Unpacked codes with their meta, and packed ones unpacked through the table."""
    W = torch.randn(N, K, generator=rng).bfloat16()
    params = BaseQuantizeConfig(nbits=4, group_size=64)["weight_quant_params"]
    loose, loose_meta = Quantizer.quantize(
        W, **params, device="cpu", compute_dtype=torch.bfloat16, bitpack=False
    )
    packed, meta = Quantizer.quantize(W, **params, device="cpu", compute_dtype=torch.bfloat16)
    assert loose_meta["packing"] is None
    assert torch.equal(Quantizer.unpack[meta["packing"]](packed).view(N, K), loose.view(N, K).to(torch.uint8))
    assert meta["scale"].numel() == meta["zero"].numel() == N * K // 64


def test_libraries_that_free_a_layer_themselves(rng: torch.Generator) -> None:
    source = layer(rng)
    view = source.meta
    del source.W_q
    del source.meta
    del source.bias
    assert not source.is_initialized()
    assert view is not None and view["nbits"] == 4  # who kept the description can still read it


def test_a_subclass_with_codes_as_its_weight(rng: torch.Generator) -> None:
    """Frameworks that look at `weight` for the device of a layer define it in a subclass."""

    class Layer(HQQLinear):
        @property
        def weight(self) -> Any:
            return self.W_q

    source = Layer(nn.Linear(K, N), BaseQuantizeConfig(nbits=4), compute_dtype=torch.float32, device="cpu")
    assert source.weight is source.W_q
    assert source(torch.randn(2, K, generator=rng)).shape == (2, N)


def test_detection_by_name_and_attributes(rng: torch.Generator) -> None:
    """LlamaFactory and unsloth look for the class's name and for attributes, not for the class."""
    source = layer(rng)
    assert type(source).__name__ == "HQQLinear"
    assert f"{type(source).__module__}.{type(source).__name__}".startswith("hqq.")
    assert hasattr(source, "W_q") and source.W_q is not None
    assert source.weight.numel() == 0 and source.weight.dtype == source.compute_dtype
    assert (source.in_features, source.out_features) == (K, N)
    assert [name for name, _ in source.named_parameters()] == ["W_q", "bias"]
    assert not any(parameter.requires_grad for parameter in source.parameters())


def test_old_names_of_the_backends() -> None:
    assert HQQBackend.ATEN_BACKPROP is HQQBackend.ATEN is HQQBackend.TRITON
    assert HQQBackend.PYTORCH_BACKPROP is HQQBackend.PYTORCH


@pytest.mark.parametrize("name", ["set_vllm_onthefly_hqq_quant", "set_vllm_hqq_backend"])
def test_vllm_is_refused_in_one_sentence(name: str) -> None:
    from hqq.utils import vllm

    call = getattr(vllm, name)
    options: dict[str, Any] = (
        {"backend": vllm.VLLM_HQQ_BACKEND.GEMLITE}
        if name == "set_vllm_hqq_backend"
        else {"weight_bits": 4, "group_size": 64, "quant_mode": "static", "skip_modules": ["lm_head"]}
    )
    with pytest.raises(BackendError, match=f"{name}; this version of hqq does not support vLLM"):
        call(**options)
