"""Products with norm, gate and residual as one call: its definition, its kernel on the host, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hqq.errors import DtypeError, ShapeError
from hqq.kernels import tiled_gemv, tiled_step
from hqq.kernels.tiled_gemv import Norm
from hqq.kernels.tiled_gemv_config import choose_gemv
from hqq.kernels.tiled_step import gate_fits, step_linear, takes
from hqq.kernels.tiled_weight import TiledWeight
from tests.kernels.cuda_on_host.host_kernel import compiler
from tests.kernels.cuda_on_host.launchers import kernels_on_host
from tests.kernels.tiled import LIMIT, exact, random_qtensor

DTYPE = torch.bfloat16
N, K = 48, 256


def weight_of(axis: int) -> tuple[TiledWeight, torch.Tensor]:
    """Return two joined weights, and what they are exactly."""
    parts = [random_qtensor(4, N, K, axis, 16, DTYPE) for _ in range(2)]
    return TiledWeight.cat([TiledWeight.from_qtensor(q, DTYPE) for q in parts]), torch.cat(
        list(map(exact, parts))
    )


@pytest.mark.parametrize("on_kernel", [False, True])
@pytest.mark.parametrize(("axis", "gated"), [(0, False), (1, False), (1, True)])
def test_what_it_computes(axis: int, gated: bool, on_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, W = weight_of(axis)
    outputs = N if gated else 2 * N
    # A view whose rows begin at an odd place: kernels get a copy.
    x, residual = torch.randn(2, K + 1).to(DTYPE)[:, 1:], torch.randn(2, outputs).to(DTYPE)
    bias, by = torch.randn(2 * N).to(DTYPE), torch.rand(K).to(DTYPE)
    arguments: dict[str, Any] = {"norm": Norm(by, 1e-3), "gated": gated, "residual": residual}
    assert not takes(weight, x, gated)
    if on_kernel:
        if compiler() is None:
            pytest.skip("no C++ compiler on this machine")
        monkeypatch.setattr(tiled_step, "takes", lambda *args: True)
        monkeypatch.setattr(tiled_step, "gemv_config", lambda work, device: choose_gemv(work, 3))
        with kernels_on_host(tiled_gemv):
            got = step_linear(x, weight, bias, **arguments)
    else:
        got = step_linear(x, weight, bias, **arguments)
    v = x.double()
    y = (v * (v.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * by.double()) @ W.T + bias.double()
    if gated:
        gate, other = y.chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * other
    y = y + residual.double()
    assert got.dtype == DTYPE
    assert float((got.double() - y).norm() / y.norm()) <= LIMIT[DTYPE]


def test_what_it_refuses() -> None:
    weight, _ = weight_of(1)
    x = torch.randn(2, K).to(DTYPE)
    with pytest.raises(ShapeError, match=r"takes 256 in the last dimension"):
        step_linear(x[:, :-1], weight)
    with pytest.raises(DtypeError, match="got input of torch.float16"):
        step_linear(x.half(), weight)
    with pytest.raises(ShapeError, match=r"got a norm weight of shape \(255,\); expected \(256,\)"):
        step_linear(x, weight, norm=Norm(torch.rand(K - 1).to(DTYPE), 1e-6))
    with pytest.raises(ShapeError, match=r"got a residual of shape \(2, 96\); expected \(2, 48\)"):
        step_linear(x, weight, gated=True, residual=torch.randn(2, 2 * N).to(DTYPE))


def test_a_gate_needs_row_tiles_of_its_own() -> None:
    def single(rows: int, axis: int = 1) -> TiledWeight:
        return TiledWeight.from_qtensor(random_qtensor(4, rows, K, axis, 16, DTYPE), DTYPE)

    assert gate_fits(weight_of(1)[0]) and not gate_fits(weight_of(0)[0])
    assert gate_fits(single(64)) and not gate_fits(single(64, axis=0))
    assert not gate_fits(single(48)), "the second tile has rows of the gate and of the other"
    assert not gate_fits(TiledWeight.cat([single(32), single(64)]))
