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


def case_id(case: Case) -> str:
    name, dtype, (N, K), options = case
    return "-".join([name, str(dtype).removeprefix("torch."), f"{N}x{K}", *map(str, options.values())])


@pytest.fixture(params=CASES, ids=case_id)
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


def inputs(layer: HQQLinear, M: int) -> Tensor:
    return torch.randn(M, layer.in_features, device="cuda", dtype=layer.compute_dtype)


def test_products_and_the_way_back(case: Case, layer: HQQLinear) -> None:
    before = copy.deepcopy(dict(layer.state_dict()))
    prepare_for_inference(layer, backend=case[0], strict=True)
    assert layer.prepared is not None and layer.prepared.backend == case[0]
    assert same_state(dict(layer.state_dict()), before)
    bound = 1e-2 if case[1] == torch.bfloat16 or case[0] == "gemlite" else 2e-3
    for M in (1, 70) if case[0] == "gemlite" else (1, 3, 16, 70):
        x = inputs(layer, M)
        y, expected = layer(x), exact(layer, x)
        assert y.dtype == case[1]
        assert float((y.double() - expected).norm()) <= bound * float(expected.norm()), M
    restore(layer)
    assert same_state(dict(layer.state_dict()), before)


def test_gradients_are_those_of_the_reference(case: Case, layer: HQQLinear) -> None:
    layer.bias.requires_grad_(True)
    x = inputs(layer, 5).requires_grad_(True)
    g = torch.randn(5, layer.out_features, device="cuda", dtype=case[1])
    expected = torch.autograd.grad(layer(x), (x, layer.bias), g)
    prepare_for_inference(layer, backend=case[0], strict=True)
    for got, wanted in zip(torch.autograd.grad(layer(x), (x, layer.bias), g), expected, strict=True):
        assert torch.equal(got, wanted)


def test_copies_and_moves(case: Case, layer: HQQLinear) -> None:
    prepare_for_inference(layer, backend=case[0], strict=True)
    before, x = copy.deepcopy(dict(layer.state_dict())), inputs(layer, 2)
    other = copy.deepcopy(layer)
    assert other.prepared is not None and torch.equal(other(x), layer(x))
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
    layers = [
        HQQLinear(
            linear(rng, 256, 256), config(4, group_size=64), compute_dtype=torch.bfloat16, device="cuda"
        )
        for _ in range(2)
    ]
    model = nn.Sequential(*layers)
    prepare_for_inference(model, backend=name, strict=True)
    x = inputs(layers[0], 1)
    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        for _ in range(3):
            assert float((compiled(x) - expected).norm()) <= 1e-2 * float(expected.norm())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        x.copy_(inputs(layers[0], 1))
        graph.replay()
        torch.cuda.synchronize()
        expected = model(x)
        assert float((y - expected).norm()) <= 1e-2 * float(expected.norm())


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
