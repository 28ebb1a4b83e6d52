"""Modules that compute with a child's weight: those children stay whole, and only those."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hqq import QuantConfig, quantize_model


class ReadsWeight(nn.Module):
    """As timm's BEiT attention: the bias is not the layer's own, so the layer is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96, bias=False), nn.Linear(32, 32)
        self.q_bias = nn.Parameter(torch.randn(96))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = F.linear(x, weight=self.qkv.weight, bias=self.q_bias).chunk(3, -1)
        if self.proj.weight.dtype == torch.float32:  # only asks: no product
            q = q * 1
        return self.proj(q + k + v)


class ReadsTransposed(ReadsWeight):
    """The other ways to write it, in a subclass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.proj.weight.t() + torch.einsum("bi,oi->bo", x, self.qkv.weight[:32])


class ReadsSometimes(nn.Module):
    """As BLOOM's `slow_but_exact` and BEiT without a bias: settings decide whether the weight is read or called."""

    def __init__(self, slices: int = 1, exact: bool = True, has_bias: bool = False) -> None:
        super().__init__()
        self.slices, self.exact = slices, exact
        self.dense, self.qkv = nn.Linear(32, 32), nn.Linear(32, 32)
        self.bias = nn.Parameter(torch.zeros(32)) if has_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.slices > 1 and self.exact:
            x = F.linear(x, self.dense.weight)
            x = x + self.dense.bias
        else:
            x = self.dense(x)
        if self.bias is None:
            return self.qkv(x)
        return F.linear(x, self.qkv.weight, self.bias)


@pytest.mark.parametrize(("cls", "read"), [(ReadsWeight, {"qkv"}), (ReadsTransposed, {"qkv", "proj"})])
@torch.no_grad()
def test_layers_whose_weight_is_read_stay_whole(
    cls: type[nn.Module], read: set[str], rng: torch.Generator
) -> None:
    model = nn.Sequential(cls(), nn.Linear(32, 32))
    x = torch.randn(4, 32, generator=rng)
    before = model(x)
    report = quantize_model(model, QuantConfig(nbits=8, group_size=32), progress=False)
    left = {row.name: row.reason for row in report.left}
    assert set(left) == {f"0.{name}" for name in read}
    assert set(left.values()) == {f"{cls.__name__} reads this layer's weight directly"}
    assert torch.linalg.vector_norm(model(x) - before) < 0.05 * torch.linalg.vector_norm(before)


@pytest.mark.parametrize(
    ("options", "read"),
    [
        ({}, {"qkv"}),  # the code after an early return is not ruled out
        ({"slices": 2}, {"dense", "qkv"}),
        ({"slices": 2, "exact": False}, {"qkv"}),
        ({"slices": 2, "has_bias": True}, {"dense", "qkv"}),
    ],
)
def test_settings_rule_branches_out(options: dict[str, int], read: set[str]) -> None:
    model = nn.Sequential(ReadsSometimes(**options), nn.Linear(32, 32))
    report = quantize_model(model, QuantConfig(nbits=8, group_size=32), progress=False)
    assert {row.name for row in report.left} == {f"0.{name}" for name in read}
