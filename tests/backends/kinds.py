"""Layers of every kind of prepared weight that can be made and multiplied on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hqq.backends import native
from hqq.core import choice
from hqq.core.linear import HQQLinear
from hqq.core.qtensor import QSpec
from hqq.kernels.tiled_weight import tiled_support
from tests.core.layers import config, linear

Kind = tuple[str, dict[str, Any]]

KINDS: tuple[Kind, ...] = (
    ("native", {"nbits": 4}),
    ("native", {"nbits": 3, "axis": 0}),
    ("native", {"nbits": 1.58, "quant_zero": True, "quant_scale": True}),
    ("native", {"nbits": 8, "view_as_float": True}),
    ("cpu", {"nbits": 4}),
    ("cpu", {"nbits": 3, "quant_zero": True}),
    ("cpu", {"nbits": 1, "group_size": None}),
    ("cpu", {"nbits": 4, "view_as_float": True, "group_size": 64}),
    ("cpu", {"nbits": 8}),
    ("cpu", {"nbits": 5, "group_size": None, "quant_zero": True}),
)
N, K = 96, 128


class NativeOnCPU(native.NativeBackend):
    """The native backend with the kernels' torch reference, which runs anywhere."""

    def available(self) -> str | None:
        return None

    def supports(self, spec: QSpec, compute_dtype: torch.dtype, device: torch.device) -> str | None:
        return tiled_support(spec, compute_dtype) if device.type == "cpu" else "takes CPU tensors"


def native_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let "native" take layers on the CPU."""
    monkeypatch.setattr(native, "MATMUL", NativeOnCPU())
    monkeypatch.setitem(choice._INSTEAD, "native", ("pytorch",))


def kind_id(kind: Kind) -> str:
    """Name of a kind for pytest."""
    return f"{kind[0]}-" + "-".join(f"{key}={value}" for key, value in kind[1].items())


def layer_of(kind: Kind, rng: torch.Generator, bias: bool = True) -> HQQLinear:
    """Return a layer [N, K] in bfloat16 on the CPU, not prepared yet."""
    return HQQLinear(linear(rng, N, K, bias), config(**kind[1]), compute_dtype=torch.bfloat16, device="cpu")
