"""Difficult weights: constant, tiny, huge, offset and outlier groups, in every storage dtype, within derived bounds."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from hqq.core.linear import HQQLinear
from hqq.core.quantizer import Quantizer
from hqq.core.solvers import SOLVERS
from hqq.errors import QuantizationWarning, WeightError
from tests import oracle

STORAGE = (torch.float32, torch.bfloat16, torch.float16)
BITS = (8, 4, 3, 2, 1.58, 1)
N, K, GS = 16, 32, 16


def randn(rng: torch.Generator) -> torch.Tensor:
    return torch.randn(N, K, generator=rng)


def outlier_in_each_group(rng: torch.Generator) -> torch.Tensor:
    W = randn(rng) * 0.02
    W.view(-1, GS)[:, 3] = 7.0
    return W


def mixed_scales(rng: torch.Generator) -> torch.Tensor:
    exponents = torch.randint(-4, 3, (N, 1), generator=rng).float()
    return randn(rng) * 10.0**exponents


def some_constant(rng: torch.Generator) -> torch.Tensor:
    W = randn(rng)
    W[::2] = torch.randn(N // 2, 1, generator=rng)
    W[1] = 0.0
    return W


WEIGHTS: dict[str, Callable[[torch.Generator], torch.Tensor]] = {
    "usual": lambda rng: randn(rng) * 0.02,
    "ones": randn,
    "hundreds": lambda rng: randn(rng) * 300,
    "1e-3": lambda rng: randn(rng) * 1e-3,
    "offset": lambda rng: 5 + randn(rng) * 0.01,
    "large offset": lambda rng: -1000 + randn(rng) * 0.05,
    "positive": lambda rng: randn(rng).abs(),
    "outlier": outlier_in_each_group,
    "mixed": mixed_scales,
    "some constant": some_constant,
    "two values": lambda rng: torch.where(randn(rng) > 0, 0.5, -0.25),
}
WIDE: dict[str, Callable[[torch.Generator], torch.Tensor]] = {
    **{f"1e{e}": lambda rng, e=e: randn(rng) * 10.0**e for e in (-6, -9, -12, -20, -30, 10, 20, 30, 37)},
    "1e38": lambda rng: (torch.rand(N, K, generator=rng) * 2 - 1) * 1e38,
    "all ranges": lambda rng: randn(rng) * 10.0 ** torch.randint(-30, 30, (N, 1), generator=rng).float(),
}


def check_bound(W: torch.Tensor, nbits: float, axis: int, dtype: torch.dtype, solver: str) -> None:
    """Every value is as near as its own group's lattice allows; where min-max does not clip, within half a step."""
    W_q, meta = Quantizer.quantize(
        W, nbits=nbits, group_size=GS, axis=axis, compute_dtype=dtype, solver=solver
    )
    scale, zero = meta["scale"].double().flatten(), meta["zero"].double().flatten()
    stored = {
        **meta,
        "scale": meta["scale"].to(dtype),
        "zero": meta["zero"].to(dtype),
        "compute_dtype": dtype,
    }
    dequantised = Quantizer.dequantize(W_q, stored).double()
    assert bool(torch.isfinite(dequantised).all())
    levels = oracle.LEVELS[nbits]
    for n, k in oracle.elements((N, K)):
        g = oracle.place(n, k, (N, K), GS, axis).group
        bound = oracle.error_bound(float(W[n, k]), float(scale[g]), float(zero[g]), levels, dtype)
        assert abs(float(dequantised[n, k]) - float(W[n, k])) <= bound


def check_half_a_step(W: torch.Tensor, nbits: float, axis: int, dtype: torch.dtype) -> None:
    """Round to nearest leaves half of (range / codes), plus what the storage dtype costs at the group's largest."""
    W_q, meta = Quantizer.quantize(
        W, nbits=nbits, group_size=GS, axis=axis, compute_dtype=dtype, optimize=False
    )
    stored = {
        **meta,
        "scale": meta["scale"].to(dtype),
        "zero": meta["zero"].to(dtype),
        "compute_dtype": dtype,
    }
    dequantised = Quantizer.dequantize(W_q, stored).double()
    error = (dequantised - W.double()).abs()
    u = torch.finfo(dtype).eps / 2
    least = torch.finfo(dtype).smallest_normal * u  # half the spacing of subnormal numbers
    levels = oracle.LEVELS[nbits]
    errors = oracle.groups_of(error.numpy(), GS, axis)
    for values, deviations in zip(oracle.groups_of(W.double().numpy(), GS, axis), errors, strict=True):
        largest = max(abs(value) for value in values)
        half_step = (max(values) - min(values)) / (levels - 1) / 2
        # zero, scale, difference and product are rounded: relative to the lattice's reach, and the step may have been
        # rounded up to what the dtype resolves at the group's offset (2^-10 of it, 2^-21 in float32).
        resolution = largest * (2.0**-10 if dtype != torch.float32 else 2.0**-21)
        allowed = half_step * (1 + 8 * u) + 6 * u * largest + resolution + 4 * levels * least
        assert max(deviations) <= allowed


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_of_moderate_size(
    weights: str, dtype: torch.dtype, nbits: float, axis: int, rng: torch.Generator
) -> None:
    W = WEIGHTS[weights](rng)
    for solver in ("minmax", "hqq"):
        check_bound(W, nbits, axis, dtype, solver)
    check_half_a_step(W, nbits, axis, dtype)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", WIDE)
def test_weights_of_any_size(
    weights: str, dtype: torch.dtype, nbits: float, axis: int, rng: torch.Generator
) -> None:
    W = WIDE[weights](rng)
    for solver in ("minmax", "hqq"):
        check_bound(W, nbits, axis, dtype, solver)
    check_half_a_step(W, nbits, axis, dtype)


@pytest.mark.parametrize("exponent", [-4, -5, -6, -7])
@pytest.mark.parametrize("nbits", BITS)
def test_small_weights_in_float16_keep_what_float16_can(
    nbits: float, exponent: int, rng: torch.Generator
) -> None:
    for axis in (0, 1):
        check_half_a_step(randn(rng) * 10.0**exponent, nbits, axis, torch.float16)


@pytest.mark.parametrize("nbits", [8, 4, 2])
@pytest.mark.parametrize("exponent", [-6, -9, -12, 0, 20, 30])
@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_the_relative_error_does_not_depend_on_the_size(
    solver: str, exponent: int, nbits: int, rng: torch.Generator
) -> None:
    # A power of two changes no digit of the weights, so min-max must give the same codes; the other solvers judge
    # residuals by their absolute size and only have to stay as near.
    W = randn(rng) * 0.02
    factor = 2.0 ** round(exponent * 3.3219)
    errors = []
    for X in (W, W * factor):
        W_q, meta = Quantizer.quantize(
            X, nbits=nbits, group_size=GS, axis=1, compute_dtype=torch.float32, solver=solver
        )
        meta["compute_dtype"] = torch.float32
        difference = Quantizer.dequantize(W_q, meta).double() - X.double()
        errors.append(float(difference.square().sum().sqrt() / X.double().square().sum().sqrt()))
    half_step = float((W.view(-1, GS).amax(1) - W.view(-1, GS).amin(1)).max()) / (2**nbits - 1) / 2
    if solver == "minmax":
        assert errors[0] == pytest.approx(errors[1], rel=1e-5)
    # as near as the worst case of min-max, root mean square below the largest half step
    assert errors[1] <= half_step / float(W.square().mean().sqrt())


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.3, -7.7, 1234.5, -6e4, 1e-3, 3e-5])
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("nbits", BITS)
def test_constant_groups_are_exact(nbits: float, dtype: torch.dtype, value: float) -> None:
    W = torch.full((8, 32), value)
    for solver in ("minmax", "hqq"):
        for axis in (0, 1):
            W_q, meta = Quantizer.quantize(
                W, nbits=nbits, group_size=16, axis=axis, compute_dtype=dtype, solver=solver
            )
            meta["compute_dtype"] = dtype
            meta["scale"], meta["zero"] = meta["scale"].to(dtype), meta["zero"].to(dtype)
            difference = (Quantizer.dequantize(W_q, meta) - W.to(dtype)).abs().max()
            # the float32 reciprocal of the scale costs the zero a unit in the last place
            assert float(difference) <= (2.0**-23 * abs(value) if dtype == torch.float32 else 0.0)


def layer(W: torch.Tensor, nbits: float, dtype: torch.dtype, **params: object) -> HQQLinear:
    config = {"weight_quant_params": {"nbits": nbits, "group_size": 16, "axis": 1, "solver": "hqq", **params}}
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight.data = W
    return HQQLinear(linear, config, compute_dtype=dtype, device="cpu")


@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize("largest", [7e4, -7e4, 1e6, 1e38])
def test_weights_beyond_float16_are_refused_by_name(
    nbits: float, largest: float, rng: torch.Generator
) -> None:
    W = torch.rand(8, 32, generator=rng)  # one end of the lattice is near zero, the other overflows
    W[2, 3] = 1.0
    linear = nn.Linear(32, 8, bias=False)
    linear.weight.data = W * largest
    before = linear.weight
    config = {"weight_quant_params": {"nbits": nbits, "group_size": 16, "axis": 1, "optimize": False}}
    with pytest.raises(
        WeightError, match=r"beyond torch\.float16's largest, 6\.55e\+04\. Use compute_dtype=torch\.bfloat16"
    ):
        HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
    assert linear.weight is before
    for dtype in (torch.bfloat16, torch.float32):
        assert bool(torch.isfinite(HQQLinear(linear, config, False, dtype, "cpu").dequantize()).all())


def test_large_constant_groups_fit_float16() -> None:
    # The unused ends of such a group's lattice would overflow, its values do not.
    W = torch.full((4, 32), 6e4)
    assert torch.equal(layer(W, 4, torch.float16).dequantize(), W.half())


def test_zero_out_of_float16_is_refused_not_stored_as_infinity(rng: torch.Generator) -> None:
    """The original stores an infinite zero for 8-bit groups of small range far from the origin."""
    W = 100 + torch.randn(8, 32, generator=rng) * 1e-4
    dequantised = layer(W, 8, torch.float16).dequantize()
    assert float((dequantised.float() - W).abs().max()) <= 100 * 2.0**-9


@pytest.mark.parametrize("size", [1e-7, 1e-9, 1e-12])
def test_float16_says_when_it_is_too_coarse(size: float, rng: torch.Generator) -> None:
    W = torch.randn(8, 32, generator=rng) * size
    with pytest.warns(QuantizationWarning, match=r"use compute_dtype=torch\.bfloat16 or torch\.float32"):
        layer(W, 4, torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        relative = (layer(W, 4, torch.bfloat16).dequantize().float() - W).norm() / W.norm()
    assert float(relative) < 0.15  # sixteen levels over about four standard deviations


@pytest.mark.parametrize("quant_zero", [False, True])
@pytest.mark.parametrize("quant_scale", [False, True])
@pytest.mark.parametrize("weights", [*WEIGHTS, "1e-6", "1e-12", "1e30"])
def test_quantised_scale_and_zero_stay_finite(
    weights: str, quant_scale: bool, quant_zero: bool, rng: torch.Generator
) -> None:
    W = {**WEIGHTS, **WIDE, "1e-6": WIDE["1e-6"]}[weights](rng)
    config = {
        "weight_quant_params": {"nbits": 4, "group_size": 16, "axis": 1, "solver": "hqq"},
        "scale_quant_params": {"nbits": 8, "channel_wise": True, "group_size": 128, "optimize": False}
        if quant_scale
        else None,
        "zero_quant_params": {"nbits": 8, "channel_wise": False, "group_size": None, "optimize": False}
        if quant_zero
        else None,
    }
    linear = nn.Linear(K, N, bias=False)
    linear.weight.data = W
    for dtype in (torch.float32, torch.bfloat16):
        dequantised = HQQLinear(linear, config, False, dtype, "cpu").dequantize()
        assert bool(torch.isfinite(dequantised).all())
