"""The dequantisation call as a torch operator, and as HQQLinear's backend."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from hqq.core.backend import HQQBackend
from hqq.core.config import BaseQuantizeConfig
from hqq.core.linear import HQQLinear
from hqq.kernels import dequantize_qtensor
from hqq.kernels.dequant_op import dequantize_op
from hqq.kernels.dequant_plan import inline_stat
from tests.kernels.quantized import ALLOW_SCRIPT_METHOD, bits_of, random_qtensor


def op_arguments(
    rng: torch.Generator, device: torch.device, nbits: float, axis: int, quantised: bool
) -> tuple[object, ...]:
    dtype = torch.bfloat16
    q = random_qtensor(
        rng,
        device,
        nbits=nbits,
        shape=(16, 96),
        group_size=48,
        axis=axis,
        dtype=dtype,
        quant_scale=quantised,
        quant_zero=quantised,
    )
    s, z = inline_stat(q.scale, dtype), inline_stat(q.zero, dtype)
    tensors = (q.W_q, s.values, s.scale, s.zero, z.values, z.scale, z.zero)
    return (
        *tensors,
        float(nbits),
        [16, 96],
        48,
        axis,
        True,
        q.spec.packing,
        s.axis,
        z.axis,
        dtype,
        dtype,
        [],
        False,
    )


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize(("nbits", "axis"), [(4, 1), (3, 0)])
def test_opcheck(
    nbits: float, axis: int, quantised: bool, rng: torch.Generator, device: torch.device
) -> None:
    torch.library.opcheck(dequantize_op, op_arguments(rng, device, nbits, axis, quantised))


@ALLOW_SCRIPT_METHOD
@pytest.mark.parametrize("quantised", [False, True])
def test_compiles_into_one_graph(
    quantised: bool, rng: torch.Generator, device: torch.device, launches: list[Tensor]
) -> None:
    q = random_qtensor(
        rng, device, nbits=4, shape=(16, 96), group_size=48, quant_scale=quantised, quant_zero=quantised
    )

    def function(x: Tensor) -> Tensor:
        return dequantize_qtensor(q, torch.float16) * x

    # The graph is what is tested here; generating CPU code for the multiplication would take most of a minute.
    compiled = torch.compile(
        function, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager"
    )
    x = torch.full((), 2.0, dtype=torch.float16, device=device)
    assert torch.equal(compiled(x), q.dequantize(torch.float16) * 2)
    assert len(launches) == 1


@pytest.fixture
def _backend() -> Iterator[None]:
    before = HQQLinear.backend
    yield
    HQQLinear.set_backend(before)


def layer_of(
    rng: torch.Generator, device: torch.device, nbits: float = 4, axis: int = 1, quant: bool = False
) -> HQQLinear:
    linear = nn.Linear(96, 32, dtype=torch.float32)
    nn.init.normal_(linear.weight, generator=rng)
    config = BaseQuantizeConfig(nbits=nbits, group_size=32, axis=axis, quant_scale=quant, quant_zero=quant)
    return HQQLinear(linear, config, compute_dtype=torch.float32, device=device)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("backend", [HQQBackend.TRITON, HQQBackend.ATEN, HQQBackend.ATEN_BACKPROP])
@pytest.mark.parametrize("quant", [False, True])
@pytest.mark.parametrize("axis", [1, 0])
def test_layer_forward_and_backward(
    axis: int,
    quant: bool,
    backend: HQQBackend,
    rng: torch.Generator,
    device: torch.device,
    launches: list[Tensor],
) -> None:
    layer = layer_of(rng, device, axis=axis, quant=quant)
    layer.set_backend(HQQBackend.PYTORCH)
    x = torch.randn(3, 96, generator=rng).to(device)
    expected = layer.dequantize()
    layer.set_backend(backend)
    assert layer.selection().reason is None
    assert torch.equal(bits_of(layer.dequantize()), bits_of(expected))
    with torch.no_grad():
        assert torch.equal(layer(x), nn.functional.linear(x, expected, layer.bias))
    x.requires_grad_()
    grad = torch.randn(3, 32, generator=rng).to(device)
    layer(x).backward(grad)
    assert torch.equal(x.grad, grad @ expected)
    assert len(launches) == 4


@pytest.mark.usefixtures("_backend")
def test_reason_is_told_once(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from hqq.core import backend

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backend._tell.cache_clear()
    first, second = layer_of(rng, torch.device("cpu")), layer_of(rng, torch.device("cpu"))
    first.set_backend(HQQBackend.TRITON)
    with caplog.at_level(logging.WARNING, logger="hqq"):
        reasons = [layer.selection().reason for layer in (first, second)]
    assert reasons == ["torch sees no CUDA device on this machine"] * 2
    assert first.selection().backend.name == "pytorch"
    assert [r.getMessage() for r in caplog.records] == [
        f"backend 'triton' is not used, layers dequantise with 'pytorch': {reasons[0]}"
    ]


@pytest.mark.usefixtures("_backend")
def test_what_the_kernels_do_not_take_goes_to_the_reference(
    rng: torch.Generator, device: torch.device
) -> None:
    layer = layer_of(rng, device).double()
    layer.set_backend(HQQBackend.TRITON)
    assert "not in torch.float64" in str(layer.selection().reason)
    assert layer.dequantize().dtype == torch.float64
