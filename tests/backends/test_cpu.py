"""torch's products on the CPU: what they take, how exact they are, and that no code is lost on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hqq.backends.cpu import MATMUL, CPUInt4Weight
from hqq.backends.int8_grouped import int8_grouped_linear
from hqq.backends.nibbles import nibble_places, nibbles, unpack_nibbles
from hqq.core.experts import HQQExperts
from hqq.core.linear import HQQLinear
from hqq.core.prepared import PreparedWeight
from hqq.core.qtensor import QTensor
from tests.core.layers import config, same_value

CPU = torch.device("cpu")


def weight(rng: torch.Generator, N: int, K: int, **options: Any) -> QTensor:
    W = torch.randn(N, K, generator=rng) * 0.1
    return HQQLinear.from_weights(W, None, config(**options), torch.bfloat16, "cpu").qtensor()


def prepared(q: QTensor) -> PreparedWeight:
    assert MATMUL.supports(q.spec, torch.bfloat16, CPU) is None
    return MATMUL.prepare(q, torch.bfloat16)


def product(q: QTensor, x: Tensor) -> Tensor:
    """In float64, from codes, scale and zero as they are stored."""
    assert isinstance(q.scale, Tensor) and isinstance(q.zero, Tensor)
    return (
        x.double()
        @ q.spec.grouping.ungroup((q.codes(torch.float64) - q.zero.double()) * q.scale.double()).t()
    )


@pytest.mark.parametrize(("N", "K"), [(16, 64), (48, 320), (64, 96), (80, 512), (144, 256), (208, 64)])
@pytest.mark.parametrize("group_size", [32, 64, None])
@pytest.mark.parametrize("nbits", [8, 6, 5, 4, 3, 2, 1.58, 1])
def test_products_and_the_way_back(
    nbits: float, group_size: int | None, N: int, K: int, rng: torch.Generator
) -> None:
    if group_size is not None and K % group_size:
        group_size = 32
    q = weight(rng, N, K, nbits=nbits, group_size=group_size)
    held = prepared(q)
    back = held.to_qtensor()
    assert back.spec == q.spec
    assert all(same_value(getattr(back, name), getattr(q, name)) for name in ("W_q", "scale", "zero"))
    for M in (1, 9, 260):
        x = torch.randn(M, K, generator=rng).bfloat16()
        y, expected = held.multiply(x), product(q, x)
        assert y.dtype == torch.bfloat16
        assert float((y.double() - expected).norm()) <= 1e-2 * float(expected.norm())


@pytest.mark.parametrize("nbits", [4, 2, 1])
def test_outliers_do_not_coarsen_the_other_weights(nbits: int, rng: torch.Generator) -> None:
    """One large weight in each group: the others lie close to one code, where (c - 8) s and z nearly cancel."""
    W = torch.randn(32, 256, generator=rng) * 0.02
    W[:, ::64] = 4
    nested = config(nbits, group_size=64)
    nested["weight_quant_params"]["optimize"] = False
    q = HQQLinear.from_weights(W, None, nested, torch.bfloat16, "cpu").qtensor()
    x = torch.randn(5, 256, generator=rng).bfloat16()
    x[:, ::64] = 0  # only the others count
    expected = product(q, x)
    assert float((prepared(q).multiply(x).double() - expected).norm()) <= 1e-2 * float(expected.norm())


def test_what_zeros_lose_is_kept_where_it_is_much(
    monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    """The rule of the kernel on CUDA, where a second product costs as much as the first."""
    monkeypatch.setattr(CPUInt4Weight, "always_exact", False)
    plain = weight(rng, 32, 256, nbits=4, group_size=64)
    assert prepared(plain)._buffers["missing"] is None
    close = plain.to(CPU)
    close.W_q = torch.zeros_like(
        plain.W_q
    )  # every weight is -0.01 of a step: what is left of two large terms
    close.zero = torch.full_like(plain.zero, 0.01)
    # All rows are nearly the same: of few tokens, all products may happen to be small.
    x = torch.randn(64, 256, generator=rng).bfloat16()
    expected = product(close, x)
    assert prepared(close)._buffers["missing"] is not None
    assert float((prepared(close).multiply(x).double() - expected).norm()) <= 2e-2 * float(expected.norm())


@pytest.mark.parametrize("nbits", [8, 4, 2])
def test_weights_far_from_zero(nbits: int, rng: torch.Generator) -> None:
    """All of a group on one side of zero: its zero lies far outside the codes, and the correction is large."""
    W = torch.rand(32, 128, generator=rng) + 3
    q = HQQLinear.from_weights(W, None, config(nbits, group_size=64), torch.bfloat16, "cpu").qtensor()
    x = torch.randn(5, 128, generator=rng).bfloat16()
    # zero * scale ~ 3 is rounded by 2^-9 of itself, in the reference as here: that is what bfloat16 can hold.
    magnitude = x.double().abs() @ (W.double().abs() + 1).t()
    assert bool(((prepared(q).multiply(x).double() - product(q, x)).abs() <= 2**-7 * magnitude).all())


@pytest.mark.parametrize(
    ("options", "dtype", "reason"),
    [
        ({"nbits": 4}, torch.float32, "torch's int4 product is used in bfloat16, not in torch.float32"),
        ({"nbits": 8}, torch.float16, "torch's int8 product is used in bfloat16, not in torch.float16"),
        ({"nbits": 4, "axis": 0}, torch.bfloat16, "torch's int4 product takes axis=1, not axis=0"),
        ({"nbits": 8, "axis": 0}, torch.bfloat16, "torch's int8 product takes groups along axis=1"),
        (
            {"nbits": 4, "group_size": 16},
            torch.bfloat16,
            "groups of a multiple of 32 that divide the 64 inputs",
        ),
        (
            {"nbits": 8, "group_size": 16},
            torch.bfloat16,
            "groups of a multiple of 32 that divide the 64 inputs",
        ),
        ({"nbits": 4, "group_size": 128}, torch.bfloat16, "that divide the 64 inputs, not of 128"),
    ],
    ids=str,
)
def test_what_it_does_not_take(
    options: dict[str, Any], dtype: torch.dtype, reason: str, rng: torch.Generator
) -> None:
    q = weight(rng, 32, 64, **options)
    refusal = MATMUL.supports(q.spec, dtype, CPU)
    assert refusal is not None and reason in refusal


def test_other_refusals(rng: torch.Generator) -> None:
    q = weight(rng, 24, 64)
    assert MATMUL.supports(q.spec, torch.bfloat16, CPU) == (
        "torch's int4 product takes a multiple of 16 outputs and of 2 inputs, not 24 and 64"
    )
    assert "take CPU tensors" in str(MATMUL.supports(q.spec, torch.bfloat16, torch.device("cuda")))
    assert MATMUL.available() is None


def test_older_torch_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_weight_int4pack_mm_for_cpu")
    assert "has no _weight_int4pack_mm_for_cpu; install torch>=2.6" in str(MATMUL.available())


def test_experts_are_dequantised_and_say_so(rng: torch.Generator) -> None:
    experts = HQQExperts.from_weights(torch.randn(3, 32, 64, generator=rng), config(), torch.bfloat16, "cpu")
    expected = experts[1]
    got = experts.prepare("cpu")
    assert (got.got, experts.prepared) == ("pytorch", None)
    assert got.reason == "experts are read as matrices, one by one, and dequantised for that"
    assert torch.equal(experts[1], expected)
    experts.unprepare()
    assert experts.preparation is None


@pytest.mark.parametrize("M", [3, 11])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_operator_is_complete(groups: int, M: int, rng: torch.Generator) -> None:
    x = torch.randn(M, 128, generator=rng).bfloat16()
    codes = torch.randint(-128, 128, (groups, 16, 128 // groups), generator=rng, dtype=torch.int8)
    scale = torch.rand(groups, 16, generator=rng).bfloat16()
    offset = torch.randn(groups, 16, generator=rng)
    torch.library.opcheck(int8_grouped_linear, (x, codes, scale, offset), test_utils=_CHECKS)
    W = (
        (codes.double() * scale.double()[..., None] + offset.double()[..., None])
        .transpose(0, 1)
        .reshape(16, -1)
    )
    expected = x.double() @ W.t()
    error = int8_grouped_linear(x, codes, scale, offset).double() - expected
    assert float(error.norm()) <= 1e-2 * float(expected.norm())


@pytest.mark.parametrize("N", [16, 64, 96, 144])
def test_the_unpacking_operator_is_complete(N: int, rng: torch.Generator) -> None:
    codes = torch.randint(0, 16, (N, 64), generator=rng, dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    operator = torch.ops.hqq.cpu_int4_codes.default
    torch.library.opcheck(operator, (packed, N, 64), test_utils=_CHECKS)
    assert torch.equal(operator(packed, N, 64), codes.to(torch.uint8))


@pytest.mark.parametrize("M", [2, 257])
def test_the_int4_operator_is_complete(M: int, rng: torch.Generator) -> None:
    codes = torch.randint(0, 16, (272, 128), generator=rng, dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    x = torch.randn(M, 128, generator=rng).bfloat16()
    s_and_z = torch.randn(2, 272, 2, generator=rng).bfloat16()
    operator = torch.ops.hqq.cpu_int4_linear.default
    torch.library.opcheck(operator, (x, packed, s_and_z, 272), test_utils=_CHECKS)
    s, z = s_and_z.double().transpose(0, 1).repeat_interleave(64, 1).unbind(-1)
    expected = x.double() @ ((codes.double() - 8) * s + z).t()
    error = operator(x, packed, s_and_z, 272).double() - expected
    assert float(error.norm()) <= 1e-2 * float(expected.norm())


_CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static")


def test_codes_come_back_from_any_order(rng: torch.Generator) -> None:
    """The packing is found out by asking it: here one that shuffles bytes and swaps halves."""
    shuffle = torch.randperm(5 * 34 // 2, generator=rng)

    def pack(codes: Tensor) -> Tensor:
        flat = codes.flatten().to(torch.uint8)
        return (flat[1::2] | flat[::2] << 4)[shuffle]

    places = nibble_places(pack, 5, 34, CPU)
    assert torch.equal(places.long().sort().values, torch.arange(5 * 34))
    codes = torch.randint(0, 16, (5, 34), generator=rng, dtype=torch.int32)
    assert torch.equal(unpack_nibbles(pack(codes)[None], places).reshape(5, 34), codes.to(torch.uint8))
    assert nibbles(torch.tensor([0x21], dtype=torch.uint8)).tolist() == [1, 2]
