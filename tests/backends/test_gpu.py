"""Prepared layers on CUDA: what each backend computes, its way back, graphs, and moves between devices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hqq.backends.prepare import prepare_for_inference, restore
from hqq.core import choice
from hqq.core.linear import HQQLinear
from tests.core.layers import config, linear, same_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Case = tuple[str, torch.dtype, tuple[int, int], dict[str, Any]]

CASES: tuple[Case, ...] = (
    *(
        ("native", dtype, shape, {"nbits": nbits, "axis": axis, "group_size": 64})
        for dtype, shape in ((torch.float16, (256, 512)), (torch.bfloat16, (192, 320)))
        for nbits, axis in ((8, 0), (4, 1), (4, 0), (3, 1), (2, 0), (1, 1))
    ),
    *(
        ("torchao_int4", torch.bfloat16, shape, {"nbits": nbits, "group_size": group_size})
        for shape in ((64, 128), (264, 1024), (40, 96))
        for nbits, group_size in ((4, 32), (4, None), (3, 32), (1, 32))
    ),
    ("torchao_int4", torch.bfloat16, (256, 512), {"nbits": 4, "group_size": 128, "quant_zero": True}),
    ("torchao_int4", torch.bfloat16, (256, 512), {"nbits": 4, "group_size": 256, "view_as_float": True}),
    # Few: gemlite tunes each new shape for seconds.
    ("gemlite", torch.float16, (256, 512), {"nbits": 4, "group_size": 64}),
    ("gemlite", torch.bfloat16, (256, 512), {"nbits": 3, "group_size": 64}),
)


UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

# What gemlite, and the kernels that it tunes, warn of is their own.
GEMLITE_WARNS = pytest.mark.filterwarnings("default")


def case_id(case: Case) -> str:
    name, dtype, (N, K), options = case
    return "-".join([name, str(dtype).removeprefix("torch."), f"{N}x{K}", *map(str, options.values())])


@pytest.fixture(
    params=[pytest.param(c, id=case_id(c), marks=GEMLITE_WARNS if c[0] == "gemlite" else ()) for c in CASES]
)
def case(request: pytest.FixtureRequest) -> Case:
    chosen: Case = request.param
    reason = choice.unavailable(chosen[0])
    if reason is not None:
        pytest.skip(reason)
    return chosen


@pytest.fixture
def layer(case: Case, rng: torch.Generator) -> HQQLinear:
    _, dtype, (N, K), options = case
    return HQQLinear(linear(rng, N, K), config(**options), compute_dtype=dtype, device="cuda")


def exact(layer: HQQLinear, x: Tensor) -> Tensor:
    q = layer.qtensor()
    scale, zero = layer._scale_and_zero()
    W = q.spec.grouping.ungroup((q.codes(torch.float64) - zero.double()) * scale.double())
    return torch.nn.functional.linear(x.double(), W, layer.bias.double())


def gemlite_noise(K: int, dtype: torch.dtype) -> float:
    """How far two calls of gemlite for few tokens may be apart, as a part of the result's norm; at least 3 times it.

    Up to K / 16 parts of a sum are added up in any order and rounded each time. A rounding is on average 0.42 units of
    what the sum has grown to, and of n such sums the root of the squares is n / 2 times the last one's square: 0.3
    units times the root of n.
    """
    return UNIT[dtype] * (K / 16) ** 0.5


def bound_of(case: Case, M: int) -> float:
    """Relative error that a product may have: for what is ours, and torch's, what the library promises."""
    name, dtype, (_, K), _ = case
    if name == "gemlite":
        # zero * scale is rounded, then the weight, then the result: 0.42 units each, of which the first, for a zero in
        # the middle of the codes, is one of some 2.4 times the weights. Together 1.2 units.
        return 3 * UNIT[dtype] + (gemlite_noise(K, dtype) if M <= 4 else 0)
    return 1e-2 if dtype == torch.bfloat16 else 2e-3


def inputs(layer: HQQLinear, M: int) -> Tensor:
    return torch.randn(M, layer.in_features, device="cuda", dtype=layer.compute_dtype)


def test_products_and_the_way_back(case: Case, layer: HQQLinear) -> None:
    before = copy.deepcopy(dict(layer.state_dict()))
    prepare_for_inference(layer, backend=case[0], strict=True)
    assert layer.prepared is not None and layer.prepared.backend == case[0]
    assert same_state(dict(layer.state_dict()), before)
    for M in (1, 70) if case[0] == "gemlite" else (1, 3, 16, 70):
        x = inputs(layer, M)
        y, expected = layer(x), exact(layer, x)
        assert y.dtype == case[1]
        assert float((y.double() - expected).norm()) <= bound_of(case, M) * float(expected.norm()), M
    restore(layer)
    assert same_state(dict(layer.state_dict()), before)


def test_gradients_are_those_of_the_reference(case: Case, layer: HQQLinear) -> None:
    layer.bias.requires_grad_(True)
    M = 1 if case[0] == "gemlite" else 5
    x = inputs(layer, M).requires_grad_(True)
    g = torch.randn(M, layer.out_features, device="cuda", dtype=case[1])
    expected = torch.autograd.grad(layer(x), (x, layer.bias), g)
    prepare_for_inference(layer, backend=case[0], strict=True)
    for got, wanted in zip(torch.autograd.grad(layer(x), (x, layer.bias), g), expected, strict=True):
        assert torch.equal(got, wanted)


def test_copies_and_moves(case: Case, layer: HQQLinear) -> None:
    prepare_for_inference(layer, backend=case[0], strict=True)
    before, x = copy.deepcopy(dict(layer.state_dict())), inputs(layer, 2)
    other = copy.deepcopy(layer)
    assert other.prepared is not None
    if case[0] == "gemlite":  # whose sums for few tokens are not the same twice
        expected = exact(layer, x)
        for y in (other(x), layer(x)):
            assert float((y.double() - expected).norm()) <= bound_of(case, 2) * float(expected.norm())
    else:
        assert torch.equal(other(x), layer(x))
    other.cpu()
    assert other.device.type == "cpu" and not other.in_gpu
    assert other.preparation is not None and other.preparation.got in ("cpu", "pytorch")
    other.cuda()
    assert other.prepared is not None and other.prepared.backend == case[0] and other.in_gpu
    assert same_state(dict(other.state_dict()), before)


@pytest.mark.filterwarnings("ignore")  # those of compilers
@pytest.mark.parametrize("name", ["native", "torchao_int4", "gemlite"])
def test_compiled_and_captured(name: str, rng: torch.Generator) -> None:
    if choice.unavailable(name) is not None:
        pytest.skip(str(choice.unavailable(name)))
    N, dtype = 256, torch.bfloat16
    layers = [
        HQQLinear(linear(rng, N, N), config(4, group_size=64), compute_dtype=dtype, device="cuda")
        for _ in range(2)
    ]
    model = nn.Sequential(*layers)
    prepare_for_inference(model, backend=name, strict=True)
    # The same kernels, of two layers and in two runs. Fused by a compiler, the bias may be added before the product is
    # rounded, which is a rounding less.
    noise = gemlite_noise(N, dtype) if name == "gemlite" else UNIT[dtype]
    x = inputs(layers[0], 1)

    def near(y: Tensor, expected: Tensor) -> bool:
        return float((y - expected).norm()) <= 4 * noise * float(expected.norm())

    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        for _ in range(3):
            assert near(compiled(x), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        x.copy_(inputs(layers[0], 1))
        graph.replay()
        torch.cuda.synchronize()
        assert near(y, model(x))


def test_default_is_native_and_says_what_is_not(rng: torch.Generator) -> None:
    reason = choice.unavailable("native")
    if reason is not None:
        pytest.skip(reason)
    model = nn.ModuleDict(
        {
            name: HQQLinear(linear(rng, 96, 128), config(**options), compute_dtype=dtype, device="cuda")
            for name, dtype, options in (
                ("a", torch.float16, {"nbits": 3, "axis": 0}),
                ("b", torch.bfloat16, {"nbits": 2, "quant_zero": True}),
                ("c", torch.float32, {"nbits": 4}),
                ("d", torch.float16, {"nbits": 4, "group_size": 8}),
            )
        }
    )
    report = prepare_for_inference(model, strict=True)
    assert [row.got for row in report.layers] == ["native", "native", "triton", "triton"]
    assert [row.reason is None for row in report.layers] == [True, True, False, False]
