"""Quantizer and quantize_tensor: any rank, every option, against the oracle."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from hqq.core.bitpack import max_code
from hqq.core.qtensor import QSpec, QTensor
from hqq.core.quantizer import Quantizer, quantize_tensor
from hqq.core.solvers.legacy import optimize_weights_proximal
from hqq.errors import ConfigError, DeviceFallbackWarning, DtypeError, HQQError, ShapeError, WeightError
from tests import oracle
from tests.cases import GRID, GRID_FP32, LAYOUTS, Case, case_id, grid


def quantize(case: Case, W: torch.Tensor, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    settings = {
        "nbits": case.nbits,
        "group_size": case.group_size,
        "axis": case.axis,
        "solver": "hqq",
        **options,
    }
    return Quantizer.quantize(W, **settings)


def stored(meta: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {**meta, "scale": meta["scale"].to(dtype), "zero": meta["zero"].to(dtype), "compute_dtype": dtype}


@pytest.mark.parametrize("case", GRID, ids=case_id)
def test_dequantises_to_the_oracles_bits(case: Case, rng: torch.Generator) -> None:
    W_q, meta = quantize(case, case.weight(rng), compute_dtype=case.dtype, optimize=False)
    meta = stored(meta, case.dtype)
    packing = oracle.PACKING_OF_BITS[case.nbits]
    expected = oracle.dequantize(
        W_q.numpy(),
        meta["scale"].flatten().tolist(),
        meta["zero"].flatten().tolist(),
        packing,
        case.shape,
        case.group_size,
        case.axis,
        case.dtype,
    )
    dequantised = Quantizer.dequantize(W_q, meta)
    assert dequantised.dtype == case.dtype
    assert torch.equal(dequantised, expected)
    rows = oracle.matrix_shape(case.shape, case.group_size, case.axis)[0]
    assert max(max(row) for row in oracle.unpack(W_q.numpy(), packing, rows)) < oracle.LEVELS[case.nbits]


@pytest.mark.parametrize("case", GRID_FP32, ids=case_id)
def test_min_max_is_the_oracles(case: Case, rng: torch.Generator) -> None:
    W = case.weight(rng)
    _, meta = quantize(case, W, optimize=False)
    levels = oracle.LEVELS[case.nbits]
    groups = oracle.groups_of(W.numpy(), case.group_size, case.axis)
    for values, scale, zero in zip(
        groups, meta["scale"].flatten().tolist(), meta["zero"].flatten().tolist(), strict=True
    ):
        if min(values) == max(values):
            assert (0 - zero) * scale == pytest.approx(values[0], rel=2.0**-22)
            continue
        expected_scale, expected_zero = oracle.min_max(values, levels)
        # span, division, reciprocal: three float32 roundings; zero has one more and the same scale
        assert scale == pytest.approx(expected_scale, rel=4 * 2.0**-24)
        assert zero == pytest.approx(expected_zero, rel=5 * 2.0**-24)


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("case", GRID, ids=case_id)
def test_error_stays_within_the_derived_bound(case: Case, optimize: bool, rng: torch.Generator) -> None:
    W = case.weight(rng)
    W_q, meta = quantize(case, W, compute_dtype=case.dtype, optimize=optimize)
    dequantised = Quantizer.dequantize(W_q, stored(meta, case.dtype)).double()
    scale, zero = meta["scale"].flatten().tolist(), meta["zero"].flatten().tolist()
    for n, k in oracle.elements(case.shape):
        g = oracle.place(n, k, case.shape, case.group_size, case.axis).group
        bound = oracle.error_bound(float(W[n, k]), scale[g], zero[g], oracle.LEVELS[case.nbits], case.dtype)
        assert abs(float(dequantised[n, k]) - float(W[n, k])) <= bound


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1.58, 1])
@pytest.mark.parametrize("shape", [(64,), (4, 6, 16), (1, 2, 5, 64), (2, 4, 7, 32)])
def test_any_rank_is_the_same_as_its_matrix(
    shape: tuple[int, ...], nbits: float, axis: int, rng: torch.Generator
) -> None:
    X = torch.randn(shape, generator=rng)
    options: dict[str, Any] = {"nbits": nbits, "group_size": 32, "axis": axis, "solver": "hqq"}
    W_q, meta = Quantizer.quantize(X, **options)
    flat_q, flat_meta = Quantizer.quantize(X.reshape(-1, 32), **options)
    assert meta["shape"] == X.shape
    assert torch.equal(W_q, flat_q)
    dequantised = Quantizer.dequantize(W_q, stored(meta, torch.float32))
    assert dequantised.shape == X.shape
    assert torch.equal(
        dequantised.reshape(-1, 32), Quantizer.dequantize(flat_q, stored(flat_meta, torch.float32))
    )


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [4, 3, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_key_value_cache_pattern(nbits: int, axis: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    """transformers quantises [batch, heads, tokens, head_dim], sets keys of meta and ignores what `cuda` returns."""
    X = torch.randn(2, 3, 11, 64, generator=rng).to(dtype)
    W_q, meta = Quantizer.quantize(
        X, axis=axis, device="cpu", compute_dtype=dtype, nbits=nbits, group_size=64
    )
    meta["compute_dtype"] = dtype
    with (
        pytest.warns(DeviceFallbackWarning) if not torch.cuda.is_available() else pytest.MonkeyPatch.context()
    ):
        Quantizer.cuda(W_q, meta=meta, device="cuda")
    meta["scale"] = meta["scale"].to(W_q.device)
    meta["zero"] = meta["zero"].to(W_q.device)
    assert meta["scale"].dtype == meta["zero"].dtype == dtype
    dequantised = Quantizer.dequantize(W_q, meta)
    assert dequantised.shape == X.shape
    assert dequantised.dtype == dtype
    step = float(meta["scale"].max())
    assert float((dequantised.float() - X.float()).abs().mean()) < step / 2


def test_three_bit_axis_1_counts_rows_by_numel(rng: torch.Generator) -> None:
    X = torch.randn(
        1, 3, 7, 32, generator=rng
    )  # 21 rows of 32: three packed rows of ten, nine of them padding
    W_q, meta = Quantizer.quantize(X, nbits=3, group_size=32, axis=1)
    assert W_q.shape == (3, 32)
    assert Quantizer.dequantize(W_q, meta).shape == X.shape


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("group_size", [None, 16])
def test_one_scale_for_the_whole_tensor(group_size: int | None, axis: int, rng: torch.Generator) -> None:
    W = torch.randn(12, 32, generator=rng)
    for nbits in (8, 4, 3, 1):
        W_q, meta = Quantizer.quantize(W, nbits=nbits, channel_wise=False, group_size=group_size, axis=axis)
        assert meta["scale"].shape == meta["zero"].shape == ()
        scale, zero = oracle.min_max(W.flatten().tolist(), 2**nbits)
        assert float(meta["scale"]) == pytest.approx(scale, rel=4 * 2.0**-24)
        dequantised = Quantizer.dequantize(W_q, stored(meta, torch.float32))
        assert float((dequantised - W).abs().max()) <= scale * 0.5 + 1e-6 * (abs(zero) + 2**nbits) * scale


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "case", list(grid(axes=(1,), dtypes=(torch.float32,), layouts=LAYOUTS[:4])), ids=case_id
)
def test_codes_left_unpacked(case: Case, axis: int, rng: torch.Generator) -> None:
    W = case.weight(rng)
    settings: dict[str, Any] = {
        "nbits": case.nbits,
        "group_size": case.group_size,
        "axis": axis,
        "solver": "hqq",
    }
    plain, plain_meta = Quantizer.quantize(W, bitpack=False, **settings)
    packed, packed_meta = Quantizer.quantize(W, **settings)
    assert plain.dtype == W.dtype
    assert plain_meta["packing"] is None
    assert set(plain.unique().tolist()) <= set(range(max_code(case.nbits) + 1))
    assert torch.equal(
        Quantizer.dequantize(plain, stored(plain_meta, torch.float32)),
        Quantizer.dequantize(packed, stored(packed_meta, torch.float32)),
    )


@pytest.mark.parametrize("compute_dtype", [None, torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_codes_viewed_as_float(nbits: int, compute_dtype: torch.dtype | None, rng: torch.Generator) -> None:
    W = torch.randn(64, 64, generator=rng)
    viewed, meta = Quantizer.quantize(W, nbits=nbits, view_as_float=True, compute_dtype=compute_dtype)
    plain, plain_meta = Quantizer.quantize(W, nbits=nbits, compute_dtype=compute_dtype)
    assert viewed.dtype == (compute_dtype or torch.float32)
    assert viewed.nbytes == plain.nbytes
    assert torch.equal(viewed.view(meta["unpack_view_dtype"]), plain)
    dtype = compute_dtype or torch.float16
    assert torch.equal(
        Quantizer.dequantize(viewed, stored(meta, dtype)),
        Quantizer.dequantize(plain, stored(plain_meta, dtype)),
    )


def test_rows_that_do_not_fill_floats_are_refused(rng: torch.Generator) -> None:
    W = torch.randn(8, 9, generator=rng)
    with pytest.raises(ConfigError, match=r"rows of 9 bytes, which torch\.float16 does not divide; use"):
        Quantizer.quantize(W, group_size=9, axis=1, nbits=8, view_as_float=True, compute_dtype=torch.float16)


def test_a_users_function_replaces_the_solver(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    calls: list[dict[str, Any]] = []

    def halve_the_codes(
        tensor: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        min_max: list[int],
        axis: int,
        device: object,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        calls.append({"shape": tensor.shape, "min_max": min_max, "axis": axis})
        return torch.full_like(tensor, 2.0), scale * 2, zero + 1

    monkeypatch.setattr(Quantizer, "optimize_weights", staticmethod(halve_the_codes))
    W = torch.randn(4, 32, generator=rng)
    W_q, meta = Quantizer.quantize(W, nbits=4, group_size=16, axis=1)
    assert calls == [{"shape": (8, 16), "min_max": [0, 15], "axis": 1}]
    assert torch.equal(W_q, torch.full((4, 16), 0x22, dtype=torch.uint8))
    low, high = W.reshape(8, 16).amin(1, keepdim=True), W.reshape(8, 16).amax(1, keepdim=True)
    torch.testing.assert_close(meta["scale"], (high - low) / 15 / 2, rtol=1e-6, atol=0)
    # A quotient of numbers up to 15 and a sum, each rounded a few times in both; sums may cancel.
    torch.testing.assert_close(meta["zero"], -low * 15 / (high - low) + 1, rtol=1e-6, atol=16 * 8 * 2.0**-24)


def test_the_default_function_can_be_put_back(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    W = torch.randn(4, 32, generator=rng)
    expected, _ = Quantizer.quantize(W, solver="minmax")
    monkeypatch.setattr(Quantizer, "optimize_weights", optimize_weights_proximal)
    assert torch.equal(Quantizer.quantize(W, solver="minmax")[0], expected)


def test_the_class_attributes_that_callers_read() -> None:
    assert Quantizer.SUPPORTED_BITS == [8, 6, 5, 4, 3, 2, 1.58, 1]
    assert Quantizer.bit_to_packing == oracle.PACKING_OF_BITS
    assert (
        set(Quantizer.pack)
        == set(Quantizer.unpack)
        == set(Quantizer.unpack_view_dtype)
        == set(oracle.PACKINGS)
    )
    assert Quantizer.unpack_view_dtype["3bit_32"] == torch.int32
    codes = torch.arange(20, dtype=torch.uint8).reshape(10, 2) % 8
    assert torch.equal(Quantizer.unpack["3bit_32"](Quantizer.pack["3bit_32"](codes)), codes)


class TestMoving:
    def meta(self, rng: torch.Generator) -> tuple[torch.Tensor, dict[str, Any]]:
        return Quantizer.quantize(torch.randn(8, 64, generator=rng))

    def test_in_place_changes_the_meta_that_was_given(self, rng: torch.Generator) -> None:
        W_q, meta = self.meta(rng)
        meta["compute_dtype"] = torch.bfloat16
        moved, same = Quantizer.to_inplace(W_q, meta, "cpu")
        assert same is meta
        assert meta["scale"].dtype == meta["zero"].dtype == torch.bfloat16
        assert moved is not None
        assert torch.equal(moved, W_q)

    def test_out_of_place_leaves_it(self, rng: torch.Generator) -> None:
        W_q, meta = self.meta(rng)
        before = copy.deepcopy(meta)
        _, other = Quantizer.to_ooplace(W_q, meta, "cpu")
        assert other["scale"].dtype == torch.float16  # the original's default
        assert meta["scale"].dtype == torch.float32
        assert torch.equal(meta["scale"], before["scale"])
        assert Quantizer.cpu(W_q, meta)[1]["zero"].dtype == torch.float16

    def test_nested_descriptions_move_too(self, rng: torch.Generator) -> None:
        W_q, meta = self.meta(rng)
        meta["zero_q"], meta["meta_zero"] = Quantizer.quantize(
            meta.pop("zero"), nbits=8, channel_wise=False, group_size=None
        )
        _, moved = Quantizer.to_ooplace(W_q, {**meta, "compute_dtype": torch.bfloat16}, "meta")
        assert moved["zero_q"].device.type == moved["meta_zero"]["scale"].device.type == "meta"
        assert moved["meta_zero"]["scale"].dtype == torch.bfloat16
        assert moved["zero_q"].dtype == torch.uint8

    def test_only_meta(self, rng: torch.Generator) -> None:
        assert Quantizer.cuda(None, self.meta(rng)[1], "cpu")[0] is None


@pytest.mark.parametrize(
    ("W", "settings", "error", "message"),
    [
        (
            torch.ones(4, 4, dtype=torch.int32),
            {},
            DtypeError,
            r"got a weight of torch\.int32; expected a floating",
        ),
        (torch.ones(4, 4, dtype=torch.complex64), {}, DtypeError, "expected a floating-point dtype"),
        (torch.ones(0, 4), {}, ShapeError, r"got an empty weight of shape \(0, 4\)"),
        (torch.ones(4, 64, device="meta"), {}, WeightError, "meta device"),
        (torch.ones(4, 64), {"nbits": 7}, ConfigError, "got nbits=7"),
        (torch.ones(4, 64), {"nbits": True}, ConfigError, "got nbits=True"),
        (torch.ones(4, 64), {"axis": 2}, ConfigError, "got axis=2"),
        (
            torch.ones(4, 64),
            {"group_size": 48},
            ConfigError,
            "group_size=48 does not divide the 256 elements",
        ),
        (torch.ones(4, 64), {"solver": "magic"}, ConfigError, "got solver='magic'"),
        (torch.ones(4, 64), {"compute_dtype": torch.int8}, DtypeError, r"got compute_dtype=torch\.int8"),
        (torch.full((4, 64), float("nan")), {}, WeightError, "NaN or infinite"),
        (torch.full((4, 64), float("-inf")), {}, WeightError, "NaN or infinite"),
        (torch.full((4, 64), 1e300, dtype=torch.float64), {}, WeightError, "NaN or infinite"),
    ],
    ids=lambda value: None if isinstance(value, torch.Tensor) else str(value)[:30],
)
def test_bad_input(W: torch.Tensor, settings: dict[str, Any], error: type[HQQError], message: str) -> None:
    with pytest.raises(error, match=message):
        Quantizer.quantize(W, **settings)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("settings", [{"optimize": False}, {"solver": "hqq"}, {"channel_wise": False}])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_single_bad_value_is_found(
    bad: float, settings: dict[str, Any], axis: int, rng: torch.Generator
) -> None:
    W = torch.randn(8, 64, generator=rng)
    W[int(torch.randint(8, (), generator=rng)), int(torch.randint(64, (), generator=rng))] = bad
    with pytest.raises(WeightError, match="NaN or infinite"):
        Quantizer.quantize(W, axis=axis, **settings)


def test_the_weight_is_not_changed(rng: torch.Generator) -> None:
    W = torch.randn(8, 64, generator=rng, requires_grad=True)
    before = W.detach().clone()
    W_q, meta = Quantizer.quantize(W)
    assert torch.equal(W.detach(), before)
    assert not W_q.requires_grad
    assert not meta["scale"].requires_grad


def test_a_transposed_weight_is_read_by_its_values(rng: torch.Generator) -> None:
    W = torch.randn(64, 8, generator=rng).t()
    assert torch.equal(Quantizer.quantize(W)[0], Quantizer.quantize(W.contiguous())[0])


class TestQTensor:
    def q(self, rng: torch.Generator, **options: Any) -> QTensor:
        settings: dict[str, Any] = {"nbits": 4, "group_size": 16, "axis": 1, **options}
        return quantize_tensor(torch.randn(6, 32, generator=rng), **settings)

    def test_bytes_are_those_of_its_tensors(self, rng: torch.Generator) -> None:
        assert self.q(rng).nbytes == 6 * 32 // 2 + 2 * 12 * 4

    def test_moves_as_a_copy(self, rng: torch.Generator) -> None:
        q = self.q(rng)
        moved = q.to(torch.device("meta"))
        assert moved.device.type == moved.scale.device.type == "meta"
        assert q.device.type == "cpu"

    def test_codes_fit_their_bits(self, rng: torch.Generator) -> None:
        codes = self.q(rng, nbits=1.58).codes()
        np.testing.assert_array_equal(np.unique(codes.numpy()), [0, 1, 2])

    @pytest.mark.parametrize(
        ("replace", "error"),
        [
            ({"W_q": torch.zeros(16, 6, dtype=torch.uint8)}, ShapeError),
            ({"W_q": torch.zeros(96, dtype=torch.uint8)}, ShapeError),
            ({"W_q": torch.zeros(6, 16, dtype=torch.int32)}, DtypeError),
            ({"W_q": torch.zeros(6, 16, dtype=torch.float16)}, ShapeError),
            ({"scale": torch.zeros(1, 12)}, ShapeError),
            ({"scale": torch.zeros(12)}, ShapeError),
            ({"zero": torch.zeros(11, 1)}, ShapeError),
            ({"zero": torch.zeros(12, 1, dtype=torch.int32)}, DtypeError),
        ],
    )
    def test_check_finds_what_does_not_fit(
        self, replace: dict[str, torch.Tensor], error: type[HQQError], rng: torch.Generator
    ) -> None:
        q = self.q(rng)
        assert q.check() is q
        with pytest.raises(error, match=r"got .*expected"):
            QTensor(**{"W_q": q.W_q, "scale": q.scale, "zero": q.zero, "spec": q.spec, **replace}).check()

    def test_a_format_too_narrow_for_the_bits_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="got nbits=8 with packing='4bit_u8', which holds 4 bits"):
            QSpec(8, (4, 64), packing="4bit_u8")
        assert QSpec(1, (4, 64), packing="2bit_u8").max_code == 1  # 1.58 bit, as the original reads it back
