"""The product: values, gradients, batch shapes, autocast, torch.compile, torch.export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hqq.core.backend import HQQBackend
from hqq.errors import DtypeError
from tests.core.layers import exact, linear_bound, product_bound, quantized

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"nbits": 3, "axis": 0},
    {"nbits": 8, "view_as_float": True},
    {"nbits": 1.58, "quant_zero": True, "quant_scale": True},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product(dtype: torch.dtype, bias: bool, options: dict[str, Any], rng: torch.Generator) -> None:
    layer = quantized(rng, dtype, bias=bias, **options)
    x = torch.randn(5, 64, generator=rng).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert bool(((y.double() - exact(layer, x)).abs() <= product_bound(layer, x)).all())
    assert torch.equal(layer.matmul(x), x @ layer.dequantize().t())
    back = torch.randn(5, 24, generator=rng).to(dtype)
    assert torch.equal(layer.matmul(back, transpose=False), back @ layer.dequantize())
    assert torch.equal(layer.dequantize_aten(), layer.dequantize())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("batch", [(), (0,), (1,), (3,), (2, 0), (2, 3), (2, 1, 3, 2)], ids=str)
def test_batch_shapes(batch: tuple[int, ...], grad: bool, rng: torch.Generator) -> None:
    layer = quantized(rng)
    layer.bias.requires_grad_(grad)
    x = torch.randn(*batch, 64, generator=rng, requires_grad=grad)
    y = layer(x)
    assert y.shape == (*batch, 24)
    assert bool(((y.double() - exact(layer, x)).abs() <= product_bound(layer, x)).all())
    if grad:
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
        torch.testing.assert_close(layer.bias.grad, torch.full((24,), float(torch.tensor(batch).prod())))


def test_a_strided_input(rng: torch.Generator) -> None:
    layer = quantized(rng)
    x = torch.randn(64, 6, generator=rng).t()
    assert bool(((layer(x).double() - exact(layer, x)).abs() <= product_bound(layer, x)).all())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_a_plain_product(
    dtype: torch.dtype, options: dict[str, Any], rng: torch.Generator
) -> None:
    layer = quantized(rng, dtype, **options)
    layer.bias.requires_grad_(True)
    x = torch.randn(2, 5, 64, generator=rng).to(dtype).requires_grad_(True)
    upstream = torch.randn(2, 5, 24, generator=rng).to(dtype)
    layer(x).backward(upstream)

    x64 = x.detach().double().requires_grad_(True)
    bias64 = layer.bias.detach().double().requires_grad_(True)
    F.linear(x64, layer.dequantize().double(), bias64).backward(upstream.double())
    assert x.grad is not None
    assert x64.grad is not None
    assert bias64.grad is not None
    assert x.grad.dtype == layer.bias.grad.dtype == dtype
    u = torch.finfo(dtype).eps / 2
    # sums of 24 (weights) and of 10 (rows) rounded products
    scale_x = upstream.double().abs() @ layer.dequantize().double().abs()
    assert bool(((x.grad.double() - x64.grad).abs() <= 26 * u * scale_x + 1e-7).all())
    scale_b = upstream.double().abs().sum((0, 1))
    assert bool(((layer.bias.grad.double() - bias64.grad).abs() <= 12 * u * scale_b).all())
    assert layer.W_q.grad is None
    assert layer.scale is None or not layer.scale.requires_grad


def test_gradcheck_and_second_derivative(rng: torch.Generator) -> None:
    layer = quantized(rng, torch.float64)
    layer.bias.requires_grad_(True)
    x = torch.randn(3, 64, generator=rng, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


@pytest.mark.parametrize("needs", ["x", "bias"])
def test_only_what_needs_a_gradient_gets_one(needs: str, rng: torch.Generator) -> None:
    layer = quantized(rng)
    x = torch.randn(3, 64, generator=rng, requires_grad=needs == "x")
    layer.bias.requires_grad_(needs == "bias")
    layer(x).sum().backward()
    assert (x.grad is not None) == (needs == "x")
    assert (layer.bias.grad is not None) == (needs == "bias")


def test_the_graph_keeps_codes_and_no_weight(rng: torch.Generator) -> None:
    layer = quantized(rng)
    saved: list[torch.Tensor] = []

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        layer(torch.randn(3, 64, generator=rng, requires_grad=True))
    assert layer.W_q.data_ptr() in {tensor.data_ptr() for tensor in saved}
    assert all(tensor.numel() < 24 * 64 for tensor in saved)


def test_no_graph_without_gradients(rng: torch.Generator) -> None:
    layer = quantized(rng)
    x = torch.randn(3, 64, generator=rng)
    assert layer(x).grad_fn is None
    with torch.no_grad():
        assert layer(x.requires_grad_(True)).grad_fn is None
    with torch.inference_mode():
        assert layer(x.detach()).is_inference()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64], ids=str)
def test_another_input_dtype_is_refused(dtype: torch.dtype) -> None:
    layer = quantized(torch.Generator())
    with pytest.raises(
        DtypeError, match=rf"got input of {dtype}; the layer computes in torch\.float32\. Cast"
    ):
        layer(torch.ones(2, 64, dtype=dtype))


def test_another_input_length_is_refused(rng: torch.Generator) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        quantized(rng)(torch.ones(2, 63))


@pytest.mark.parametrize("layer_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(x_dtype: torch.dtype, layer_dtype: torch.dtype, rng: torch.Generator) -> None:
    layer = quantized(rng, layer_dtype)
    layer.bias.requires_grad_(True)
    x = torch.randn(4, 64, generator=rng).to(x_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = layer(x)
        y = layer(x.requires_grad_(True))
    operands = [part.detach().bfloat16() for part in (x, layer.dequantize(), layer.bias)]
    expected = F.linear(*(part.double() for part in operands))
    assert y.dtype == plain.dtype == torch.bfloat16
    bound = linear_bound(*operands)
    for found in (plain, y):
        assert bool(((found.detach().double() - expected).abs() <= bound).all())
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == x_dtype
    assert layer.bias.grad.dtype == layer_dtype
    # A sum of 24 weights, each rounded to bfloat16, and rounded itself, also to float32 numbers of bfloat16.
    W = layer.dequantize().double()
    allowed = 3 * torch.finfo(torch.bfloat16).eps / 2 * W.abs().sum(0)
    assert bool(((x.grad.double() - W.sum(0)).abs() <= allowed).all())


# torch's own: its compiler instantiates autograd functions, and inductor imports torch.jit code.
@pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh_compiler(self) -> Any:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_fullgraph_forward(self, options: dict[str, Any], rng: torch.Generator) -> None:
        layer = quantized(rng, **options)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(5, 64, generator=rng)
        assert bool(((compiled(x) - layer(x)).abs() <= 2 * product_bound(layer, x)).all())

    def test_fullgraph_training(self, rng: torch.Generator) -> None:
        layer = quantized(rng)
        layer.bias.requires_grad_(True)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(5, 64, generator=rng)
        eager_x, compiled_x = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
        layer(eager_x).square().sum().backward()
        eager_bias, layer.bias.grad = layer.bias.grad, None
        compiled(compiled_x).square().sum().backward()
        # Both gradients are sums of 2 y, over 24 outputs and 5 rows: what y is off by, and the roundings of the sums.
        u, off, y = 2.0**-24, 2 * product_bound(layer, x), layer(x).detach().abs()
        allowed = 2 * off + 2 * 26 * u * 2 * y
        W = layer.dequantize().double().abs()
        assert bool(((compiled_x.grad - eager_x.grad).abs() <= allowed @ W).all())
        assert bool(((layer.bias.grad - eager_bias).abs() <= allowed.sum(0)).all())

    def test_inside_a_model_and_autocast(self, rng: torch.Generator) -> None:
        model = torch.nn.Sequential(quantized(rng, bias=False), torch.nn.ReLU())

        def run(x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return model(x)

        x = torch.randn(5, 64, generator=rng)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        difference = compiled(x).double() - run(x).double()
        allowed = 2 * linear_bound(x.bfloat16(), model[0].dequantize().bfloat16(), None)
        assert bool((difference.abs() <= allowed).all())

    @pytest.mark.slow
    def test_inductor(self, rng: torch.Generator) -> None:
        layer = quantized(rng, nbits=3)
        x = torch.randn(5, 64, generator=rng)
        compiled = torch.compile(layer, fullgraph=True)
        assert bool(((compiled(x).double() - exact(layer, x)).abs() <= 2 * product_bound(layer, x)).all())

    @pytest.mark.slow
    def test_the_compiled_backend(self, rng: torch.Generator) -> None:
        layer = quantized(rng)
        expected = layer.dequantize()
        layer.backend = HQQBackend.PYTORCH_COMPILE
        assert layer.selection().reason is None
        torch.testing.assert_close(layer.dequantize(), expected, rtol=2.0**-22, atol=0)

    @pytest.mark.parametrize("strict", [False, True])
    def test_export(self, strict: bool, rng: torch.Generator) -> None:
        layer = quantized(rng)
        x = torch.randn(5, 64, generator=rng)
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},), strict=strict)
        longer = torch.randn(9, 64, generator=rng)
        difference = program.module()(longer) - layer(longer)
        assert bool((difference.abs() <= 2 * product_bound(layer, longer)).all())
