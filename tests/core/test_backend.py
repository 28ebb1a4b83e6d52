"""Backends: their names, the choice of one, and the reason where it is not the one asked for."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hqq.core import backend as backend_module
from hqq.core.backend import EAGER, EagerBackend, HQQBackend, get_backend, select
from hqq.core.embedding import HQQEmbedding
from hqq.core.linear import HQQLinear
from hqq.core.qtensor import QSpec, dequantize
from hqq.errors import BackendError
from tests.core.layers import quantized


class Doubling(EagerBackend):
    """Gives twice the weight, so that its use shows; takes 4 bit only."""

    name = "triton"

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason
        self.asked = 0

    def available(self) -> str | None:
        self.asked += 1
        return self.reason

    def supports(self, spec: QSpec, compute_dtype: torch.dtype, device: torch.device) -> str | None:
        return None if spec.nbits == 4 else f"takes 4 bit, got {spec.nbits}"

    def dequantize(
        self, W_q: Tensor, scale: Tensor, zero: Tensor, spec: QSpec, compute_dtype: torch.dtype
    ) -> Tensor:
        return dequantize(W_q, scale, zero, spec, compute_dtype) * 2


@pytest.fixture
def restore() -> Iterator[None]:
    previous = HQQLinear.backend
    yield
    HQQLinear.set_backend(previous)


@pytest.fixture
def doubling(monkeypatch: pytest.MonkeyPatch, restore: None) -> Doubling:
    backend = Doubling()
    monkeypatch.setattr(backend_module, "import_module", lambda name: SimpleNamespace(BACKEND=backend))
    return backend


def test_names_of_the_original() -> None:
    assert HQQBackend.ATEN is HQQBackend.ATEN_BACKPROP is HQQBackend.ATEN_FORWARD is HQQBackend.TRITON
    assert HQQBackend.PYTORCH_BACKPROP is HQQBackend.PYTORCH_FORWARD is HQQBackend.PYTORCH
    assert (
        HQQBackend.PYTORCH_BACKPROP_COMPILE
        is HQQBackend.PYTORCH_FORWARD_COMPILE
        is HQQBackend.PYTORCH_COMPILE
    )


def test_every_member_names_a_backend() -> None:
    assert get_backend("pytorch") is EAGER
    assert get_backend("pytorch_compile").name == "pytorch_compile"
    assert {member.value for member in HQQBackend} == {"pytorch", "pytorch_compile", "triton"}


def test_unknown_backends() -> None:
    with pytest.raises(
        BackendError, match=r"got backend 'magic'; expected one of pytorch, pytorch_compile, triton"
    ):
        get_backend("magic")
    with pytest.raises(BackendError, match=r"got backend 'magic'; expected one of HQQBackend\.PYTORCH, "):
        HQQLinear.set_backend("magic")  # type: ignore[arg-type]


def test_setting_one_reaches_existing_layers_and_back(doubling: Doubling, rng: torch.Generator) -> None:
    layer = quantized(rng)
    weight = layer.dequantize()
    HQQLinear.set_backend(HQQBackend.ATEN)
    assert layer.selection().backend is doubling
    assert layer.selection().reason is None
    assert torch.equal(layer.dequantize(), weight * 2)
    x = torch.randn(2, 64, generator=rng)
    torch.testing.assert_close(layer(x) - layer.bias, x @ (weight * 2).t())
    HQQLinear.set_backend(HQQBackend.PYTORCH)
    assert torch.equal(layer.dequantize(), weight)


def test_gradients_go_through_the_chosen_backend(doubling: Doubling, rng: torch.Generator) -> None:
    layer = quantized(rng)
    weight = layer.dequantize()
    layer.backend = HQQBackend.TRITON
    x = torch.randn(2, 64, generator=rng, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, (weight * 2).sum(0).expand(2, 64))


def test_the_choice_is_made_once_and_again_when_the_layer_changes(
    doubling: Doubling, rng: torch.Generator
) -> None:
    HQQLinear.set_backend(HQQBackend.TRITON)
    layer = quantized(rng)
    for _ in range(3):
        layer(torch.randn(2, 64, generator=rng))
    assert doubling.asked == 1
    layer.to(torch.float16)
    layer(torch.randn(2, 64, generator=rng).half())
    assert doubling.asked == 2


def test_what_is_refused_has_a_reason(doubling: Doubling, rng: torch.Generator) -> None:
    HQQLinear.set_backend(HQQBackend.TRITON)
    chosen = quantized(rng, nbits=3).selection()
    assert (chosen.backend, chosen.asked, chosen.reason) == (EAGER, "triton", "takes 4 bit, got 3")
    doubling.reason = "no GPU here"
    chosen = quantized(rng).selection()
    assert (chosen.backend, chosen.reason) == (EAGER, "no GPU here")


def test_the_reference_takes_everything() -> None:
    spec = QSpec(3, (7, 10), 5, 0, "3bit_32")
    for dtype in (torch.float16, torch.float64):
        assert select("pytorch", spec, dtype, torch.device("cpu")).reason is None


def test_embeddings_have_their_own_choice(doubling: Doubling, rng: torch.Generator) -> None:
    HQQLinear.set_backend(HQQBackend.TRITON)
    assert HQQEmbedding.backend is HQQBackend.PYTORCH
    assert HQQEmbedding.sharing(quantized(rng, bias=False)).selection().backend is EAGER


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_kernels_on_the_cpu_give_a_reason_and_the_reference(restore: None, rng: torch.Generator) -> None:
    pytest.importorskip("hqq.backends.triton")
    HQQLinear.set_backend(HQQBackend.ATEN)
    chosen = quantized(rng).selection()
    assert chosen.backend is EAGER
    assert chosen.reason
