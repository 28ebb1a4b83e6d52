"""Adapters to other libraries, with a stand-in for each library that computes what its documentation says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hqq.backends import bitblas, foreign, gemlite, marlin
from hqq.backends.prepare import prepare_for_inference, restore
from hqq.core import choice
from hqq.core.linear import HQQLinear
from hqq.core.prepared import MatmulBackend
from hqq.errors import BackendError
from tests.core.layers import config, linear, same_state
from tests.kernels.quantized import ALLOW_SCRIPT_METHOD

N, K = 64, 1024
MODULES = {"gemlite": gemlite, "marlin": marlin, "bitblas": bitblas}


def product(x: Tensor, W: Tensor) -> Tensor:
    """x @ W^T, summed in float32 as the libraries do."""
    return (x.float() @ W.float().t()).to(x.dtype)


class _Product(nn.Module):
    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(W, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)


class _Gemlite:
    """`gemlite.helper.A16Wn`: from_weights(codes [N, K] uint8, scales, zeros, ...) gives a module."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def from_weights(
        self, W_q: Tensor, scales: Tensor, zeros: Tensor, W_nbits: int, group_size: int, bias: None
    ) -> nn.Module:
        assert W_q.dtype == torch.uint8 and int(W_q.max()) < 2**W_nbits
        grouped = W_q.reshape(-1, group_size).to(self.dtype)
        return _Product(((grouped - zeros) * scales).reshape(W_q.shape))


class _Bitblas:
    """`bitblas.Matmul`: W = (codes - zeros) * scale, codes int8 [N, K], scale and zeros [N, groups]."""

    def __init__(self, config: SimpleNamespace) -> None:
        self.config = config

    def transform_weight(self, codes: Tensor) -> Tensor:
        assert codes.dtype == torch.int8
        return codes.view(torch.uint8) ^ 85

    def __call__(self, x: Tensor, packed: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
        c = self.config
        assert (c.with_scaling, c.with_zeros, c.zeros_mode, c.layout) == (True, True, "original", "nt")
        grouped = (packed ^ 85).reshape(c.N, -1, c.group_size).half()
        return product(x, ((grouped - zeros[..., None]) * scale[..., None]).reshape(c.N, c.K))


def _marlin() -> SimpleNamespace:
    """vLLM's functions for symmetric codes: W = (code - middle) * scale."""

    def repack(stacked: Tensor, perm: Tensor, size_k: int, size_n: int, bits: int) -> Tensor:
        assert stacked.shape == (size_k * bits // 32, size_n) and perm.numel() == 0
        return torch.stack([(stacked >> (bits * i)) & (2**bits - 1) for i in range(32 // bits)], 1).reshape(
            size_k, -1
        )

    def multiply(**a: Any) -> Tensor:
        scale = a["weight_scale"].repeat_interleave(K // a["weight_scale"].shape[0], 0)
        return product(a["input"], ((a["weight"] - a["wtype"]).to(scale.dtype) * scale).t())

    return SimpleNamespace(
        repack=repack,
        permute_scales=lambda s, size_k, size_n, group_size: s,
        workspace=lambda device: torch.zeros(1, dtype=torch.int32, device=device),
        linear=multiply,
        types={4: 8, 8: 128},
    )


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapters with stand-ins for the libraries, which take CPU tensors."""
    monkeypatch.setattr(gemlite, "_processor", lambda: _Gemlite)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.autograd.set_grad_enabled(False))
    monkeypatch.setattr(marlin, "_library", _marlin)
    fake = ModuleType("bitblas")
    fake.Matmul, fake.MatmulConfig = _Bitblas, SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitblas", fake)
    bitblas._operator.cache_clear()
    for module in MODULES.values():
        monkeypatch.setattr(module, "why_not_there", lambda library, install: None)
        on_device: Callable[..., str | None] = foreign.why_not_groups
        monkeypatch.setattr(
            module,
            "why_not_groups",
            lambda library, spec, device, check=on_device: check(library, spec, torch.device("cuda")),
        )


def layer_of(rng: torch.Generator, dtype: torch.dtype, **options: Any) -> HQQLinear:
    return HQQLinear(linear(rng, N, K), config(**options), compute_dtype=dtype, device="cpu")


def assert_near(y: Tensor, x: Tensor, layer: HQQLinear) -> None:
    """Assert that `y` is the layer's product, up to roundings to float16.

    Weights are made of two parts, to the middle of the codes and from there to the zero, of two roundings each; both
    products and their sum are rounded, and the second product may be summed in float16.
    """
    q = layer.qtensor()
    scale, zero = (stat.double() for stat in layer._scale_and_zero())
    codes, half = q.codes(torch.float64), (q.spec.max_code + 1) // 2
    ungroup = q.spec.grouping.ungroup
    W, parts = (
        ungroup((codes - zero) * scale),
        ungroup(((codes - half).abs() + (half - zero).abs()) * scale.abs()),
    )
    exact = x.double() @ W.t() + layer.bias.double()
    room = x.double().abs() @ parts.t() + layer.bias.double().abs()
    groups = K // q.spec.grouping.length
    assert bool(((y.double() - exact).abs() <= (8 + groups) * 2**-11 * room).all())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, {"nbits": nbits})
        for name in sorted(MODULES)
        for nbits in (8, 4, 3, 1.58, 1)
        if (name, nbits) != ("bitblas", 8)
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "extra",
    [{"group_size": 64}, {"group_size": None}, {"group_size": 128, "quant_zero": True}],
    ids=str,
)
def test_products_gradients_and_the_way_back(
    name: str, extra: dict[str, Any], options: dict[str, Any], on_cpu: None, rng: torch.Generator
) -> None:
    layer = layer_of(rng, torch.float16, **options, **extra)
    state, x = dict(layer.state_dict()), torch.randn(3, K, generator=rng).half().requires_grad_(True)
    expected = layer(x)
    (grad,) = torch.autograd.grad(expected.sum(), x)
    report = prepare_for_inference(layer, backend=name, strict=True)
    assert [(row.got, row.reason) for row in report.layers] == [(name, None)]
    assert layer.prepared is not None and [n for n, _ in layer.named_parameters()] == ["bias"]
    y = layer(x)
    assert_near(y.detach(), x.detach(), layer)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], grad)
    assert same_state(dict(layer.state_dict()), state)
    assert layer.prepared.nbytes > 0 and layer.device.type == "cpu"
    restore(layer)
    assert same_state(dict(layer.state_dict()), state)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    ("name", "dtype", "options", "reason"),
    [
        ("gemlite", torch.float16, {"axis": 0}, "gemlite takes groups along the inputs"),
        ("gemlite", torch.float32, {}, "gemlite is used in float16 and bfloat16"),
        (
            "gemlite",
            torch.float16,
            {"group_size": 8},
            "groups of 32 and larger powers of two at 4 bits, not of 8",
        ),
        ("gemlite", torch.float16, {"group_size": 16}, "groups of 32 and larger powers of two"),
        (
            "gemlite",
            torch.float16,
            {"nbits": 1, "group_size": 32},
            "groups of 64 and larger powers of two at 1 bit",
        ),
        (
            "marlin",
            torch.bfloat16,
            {"group_size": 16},
            "Marlin takes groups of 32, 64, 128 or whole rows, not of 16",
        ),
        ("marlin", torch.float32, {}, "Marlin computes in float16 and bfloat16"),
        ("marlin", torch.float16, {"axis": 0}, "Marlin takes groups along the inputs"),
        ("bitblas", torch.bfloat16, {}, "BitBLAS is used in float16, not in torch.bfloat16"),
        (
            "bitblas",
            torch.float16,
            {"group_size": 16},
            "BitBLAS takes groups of 32, 64, 128, 256 or whole rows",
        ),
        ("bitblas", torch.float16, {"nbits": 8}, "BitBLAS is used for 4 bits and less, not for codes of 8"),
    ],
    ids=str,
)
def test_what_they_do_not_take_falls_back_with_a_reason(
    name: str, dtype: torch.dtype, options: dict[str, Any], reason: str, on_cpu: None, rng: torch.Generator
) -> None:
    layer = layer_of(rng, dtype, **options)
    expected = layer(torch.ones(2, K, dtype=dtype))
    report = prepare_for_inference(layer, backend=name)
    assert [row.layer for row in report.missed] == [""]
    assert report.layers[0].reason is not None and reason in report.layers[0].reason
    again = layer(torch.ones(2, K, dtype=dtype))
    assert float((again - expected).norm()) <= 1e-2 * float(
        expected.norm()
    )  # of another backend, in bfloat16
    with pytest.raises(BackendError, match=f"cannot use '{name}'"):
        prepare_for_inference(layer, backend=name, strict=True)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_library_that_fails_is_a_reason(
    name: str, on_cpu: None, monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    backend: MatmulBackend = choice.get_matmul_backend(name)

    def failing(*args: Any) -> Any:
        raise BackendError("this version cannot be called")

    monkeypatch.setattr(type(backend), "prepare", failing)
    layer = layer_of(rng, torch.float16, group_size=64)
    before = dict(layer.state_dict())
    report = prepare_for_inference(layer, backend=name)
    assert report.layers[0].reason is not None
    assert "this version cannot be called" in report.layers[0].reason
    restore(layer)
    with pytest.raises(BackendError, match="this version cannot be called"):
        prepare_for_inference(layer, backend=name, strict=True)
    assert layer.preparation is None and same_state(dict(layer.state_dict()), before)


@ALLOW_SCRIPT_METHOD
@pytest.mark.parametrize("name", ["gemlite", "marlin"])
def test_products_are_one_graph(name: str, on_cpu: None, rng: torch.Generator) -> None:
    layer = layer_of(rng, torch.float16, group_size=64)
    prepare_for_inference(layer, backend=name, strict=True)
    x = torch.randn(3, K, generator=rng).half()
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), expected)


@pytest.mark.parametrize(
    ("shape", "group_size", "multiple"),
    [((64, 320), 64, 256), ((64, 384), 32, 256), ((64, 768), 128, 512), ((64, 512), None, 1024)],
)
def test_gemlite_takes_no_rows_that_end_within_a_round(
    shape: tuple[int, int], group_size: int | None, multiple: int, on_cpu: None, rng: torch.Generator
) -> None:
    layer = HQQLinear(
        linear(rng, *shape), config(4, group_size=group_size), compute_dtype=torch.float16, device="cpu"
    )
    with pytest.raises(BackendError, match=f"gemlite takes multiples of {multiple} inputs"):
        prepare_for_inference(layer, backend="gemlite", strict=True)


def test_gemlite_refuses_groups_it_would_mix_up(on_cpu: None, rng: torch.Generator) -> None:
    layer = layer_of(rng, torch.float16, group_size=16)
    with pytest.raises(BackendError, match="group_size=16: gemlite takes groups of 32 and larger"):
        gemlite.patch_hqq_to_gemlite(layer)
    assert layer.ready


@pytest.mark.parametrize(
    ("name", "package"), [("gemlite", "gemlite"), ("marlin", "vllm"), ("bitblas", "bitblas")]
)
def test_a_missing_library_says_what_to_install(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    monkeypatch.setattr(foreign, "find_spec", lambda library: None)
    layer = layer_of(rng, torch.float16)
    with pytest.raises(BackendError, match=f"{package} is not installed; pip install {package}"):
        prepare_for_inference(layer, backend=name)
    assert layer.preparation is None
    monkeypatch.setattr(foreign, "find_spec", lambda library: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=f"{package} needs a CUDA device"):
        prepare_for_inference(layer, backend=name)


@pytest.mark.parametrize("name", ["marlin", "bitblas"])
def test_old_paths_prepare_the_layer(name: str, on_cpu: None, rng: torch.Generator) -> None:
    patch = getattr(MODULES[name], f"patch_hqq_to_{name}")
    layer = layer_of(rng, torch.float16, group_size=64)
    assert patch(layer, None) is layer
    assert layer.prepared is not None and layer.prepared.backend == name
    other = nn.Linear(2, 2)
    assert patch(other) is other
    with pytest.raises(BackendError, match=f"cannot use '{name}'"):
        patch(layer_of(rng, torch.float32))
