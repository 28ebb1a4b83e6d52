"""Kernels run on the GPU where there is one, and in Triton's interpreter on the CPU elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    # Per test, so that the rest of the suite sees the machine as it is. Kernels are built at their first import, which
    # happens inside a test of this folder.
    if not torch.cuda.is_available():
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        interpret_library(monkeypatch)


def interpret_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Triton's own functions (sum, max, ...) interpreted too, if it was imported before that was asked for."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for name, value in list(vars(tl.standard).items()):
        if isinstance(value, JITFunction):
            interpreted = InterpretedFunction(value.fn)
            for module in (tl.standard, tl):
                if vars(module).get(name) is value:
                    monkeypatch.setattr(module, name, interpreted)


@pytest.fixture(autouse=True)
def _own_tuning_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HQQ_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every output a kernel was given to fill, poisoned with NaN beforehand: what is not written stays NaN.

    A test that expects a kernel checks that the list is not empty.
    """
    from hqq.kernels import dequant_launch

    outputs: list[Tensor] = []
    allocate: Callable[..., Tensor] = dequant_launch.new_output

    def poisoned(*args: object) -> Tensor:
        outputs.append(allocate(*args).fill_(float("nan")))
        return outputs[-1]

    monkeypatch.setattr(dequant_launch, "new_output", poisoned)
    return outputs
