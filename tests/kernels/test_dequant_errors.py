"""Bad input to the dequantisation call: a specific error, and nothing launched."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from hqq.errors import ConfigError, DtypeError, HQQError, ShapeError
from hqq.kernels import dequantize
from tests.kernels.quantized import random_qtensor


def call_of(rng: torch.Generator, device: torch.device) -> dict[str, Any]:
    """Return arguments that are right: 4 bit, [8, 64], groups of 32."""
    q = random_qtensor(rng, device, nbits=4, shape=(8, 64), group_size=32)
    return {
        "W_q": q.W_q,
        "scale": q.scale,
        "zero": q.zero,
        "nbits": 4,
        "shape": (8, 64),
        "group_size": 32,
        "axis": 1,
    }


BAD: list[tuple[str, dict[str, Any], type[HQQError], str]] = [
    ("bits", {"nbits": 7}, ConfigError, "got nbits=7; expected one of 8, 6"),
    ("axis", {"axis": 2}, ConfigError, "got axis=2"),
    ("group", {"group_size": 48}, ConfigError, "group_size=48 does not divide the 512 elements"),
    ("shape", {"shape": (8, 96)}, ShapeError, "got W_q of shape"),
    ("empty", {"shape": (0, 64)}, ShapeError, "got an empty tensor"),
    ("packing", {"packing": "9bit"}, ConfigError, "got packing='9bit'"),
    ("block", {"block_size": 48}, ConfigError, "got block=48"),
    ("blocks", {"block_size": 64, "autotune": True}, ConfigError, "block_size together with"),
    ("config", {"config": (64, 3, 1)}, ConfigError, "got warps=3"),
    ("phase", {"config": (64, 2, 1, 0, 4, 8, 0, 1, 6)}, ConfigError, "got phase=6 with burst=4"),
    ("resident", {"config": (64, 2, 1, 0, 0, 0, 0, 1, 0, 3)}, ConfigError, "got resident=3"),
    ("overlap", {"config": (64, 2, 1, 0, 0, 0, 0, 4)}, ConfigError, "got overlap=4"),
    ("dtype", {"out_dtype": torch.float64}, DtypeError, "got torch.float64"),
    ("compute", {"compute_dtype": torch.int32}, DtypeError, "got torch.int32"),
    ("fewer bits", {"nbits": 2}, ShapeError, "got W_q of shape"),
    ("other storage", {"nbits": 3}, DtypeError, "got W_q of torch.uint8; expected torch.int32"),
]


@pytest.mark.parametrize(("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_arguments_that_do_not_fit(
    change: dict[str, Any],
    error: type[HQQError],
    message: str,
    rng: torch.Generator,
    device: torch.device,
    launches: list[Tensor],
) -> None:
    with pytest.raises(error, match=message.replace("(", r"\(")):
        dequantize(**{**call_of(rng, device), **change})
    assert not launches


@pytest.mark.parametrize("name", ["scale", "zero"])
def test_statistics_that_do_not_fit(
    name: str, rng: torch.Generator, device: torch.device, launches: list[Tensor]
) -> None:
    good = call_of(rng, device)
    with pytest.raises(ShapeError, match=f"got 15 values of {name}; expected 16"):
        dequantize(**{**good, name: good[name][:15]})
    with pytest.raises(ShapeError, match=f"got 17 values of {name}; expected 16"):
        dequantize(**{**good, name: torch.cat([good[name], good[name][:1]])})
    with pytest.raises(DtypeError, match=f"got {name} of torch.float64"):
        dequantize(
            **{**good, name: good[name].double(), "compute_dtype": torch.float16, "out_dtype": torch.float16}
        )
    with pytest.raises(DtypeError, match=f"got {name} of torch.int32"):
        dequantize(
            **{**good, name: good[name].int(), "compute_dtype": torch.float16, "out_dtype": torch.float16}
        )
    with pytest.raises(ConfigError, match=f"got {name} on meta and W_q on {device.type}"):
        dequantize(**{**good, name: good[name].to("meta")})
    assert not launches


def test_codes_that_do_not_fit(rng: torch.Generator, device: torch.device, launches: list[Tensor]) -> None:
    good = call_of(rng, device)
    with pytest.raises(ShapeError, match=r"strides .*call \.contiguous\(\)"):
        dequantize(**{**good, "W_q": good["W_q"].t().contiguous().t()})
    with pytest.raises(ShapeError, match="got W_q of shape"):
        dequantize(**{**good, "W_q": good["W_q"][:-1]})
    with pytest.raises(DtypeError, match=r"got W_q of torch\.int8"):
        dequantize(**{**good, "W_q": good["W_q"].view(torch.int8)})
    assert not launches


def test_quantised_statistics_that_do_not_fit(
    rng: torch.Generator, device: torch.device, launches: list[Tensor]
) -> None:
    from hqq.kernels.dequant_op import dequantize_op

    q = random_qtensor(rng, device, nbits=4, shape=(8, 64), group_size=32)
    codes = torch.randint(0, 256, (16,), dtype=torch.uint8, device=device)
    five, two = torch.ones(5, device=device), torch.ones(2, device=device)
    rest = (4.0, [8, 64], 32, 1, True, "4bit_u8", 0, 0, torch.float16, torch.float16, [], False)
    with pytest.raises(ShapeError, match="got 5 scales and 5 zeros for 16 codes of scale"):
        dequantize_op(q.W_q, codes, five, five, q.zero, None, None, *rest)
    with pytest.raises(ShapeError, match="got 2 scales and 5 zeros"):
        dequantize_op(q.W_q, q.scale, None, None, codes, two, five, *rest)
    with pytest.raises(ConfigError, match="expected both or neither"):
        dequantize_op(q.W_q, codes, two, None, q.zero, None, None, *rest)
    with pytest.raises(DtypeError, match="got codes of zero as torch.float32"):
        dequantize_op(q.W_q, q.scale, None, None, codes.float(), two, two, *rest)
    assert not launches


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import hqq.kernels
from hqq.kernels import dequantize, unavailable_reason
assert "triton is not installed" in unavailable_reason()
W_q = torch.full((1, 8), 0x21, dtype=torch.uint8)
scale, zero = torch.tensor([2.0, 4.0]), torch.tensor([1.0, 0.0])
print(dequantize(W_q, scale, zero, nbits=4, shape=(2, 8), group_size=8).tolist())
"""


def test_without_triton_the_reference_answers() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str([[2.0] * 8, [4.0] * 8])


def test_importing_kernels_loads_no_triton() -> None:
    script = "import sys, hqq.kernels, hqq.backends.triton; print('triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
