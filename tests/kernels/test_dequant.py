"""The dequantisation kernel against the slow oracle and the torch reference, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hqq.core.qtensor import QTensor
from hqq.kernels import dequantize, dequantize_qtensor
from tests import oracle
from tests.cases import BITS, DTYPES, GRID, Case, case_id
from tests.kernels.quantized import bits_of, quantised_stat, random_qtensor


@pytest.mark.parametrize("case", GRID, ids=case_id)
def test_agrees_with_the_oracle_over_the_grid(
    case: Case, rng: torch.Generator, device: torch.device, launches: list[Tensor]
) -> None:
    q = random_qtensor(
        rng,
        device,
        nbits=case.nbits,
        shape=case.shape,
        group_size=case.group_size,
        axis=case.axis,
        dtype=case.dtype,
    )
    result = dequantize_qtensor(q)
    assert isinstance(q.scale, Tensor) and isinstance(q.zero, Tensor)
    packed = q.W_q.cpu().numpy()
    scale, zero = q.scale.flatten().tolist(), q.zero.flatten().tolist()
    packing = oracle.PACKING_OF_BITS[case.nbits]
    layout = (case.shape, case.group_size, case.axis)
    expected = oracle.dequantize(packed, scale, zero, packing, *layout, case.dtype)
    assert len(launches) == 1
    assert result.dtype == case.dtype
    assert torch.equal(bits_of(result), bits_of(expected))


# Shapes that tiles do not divide, N-D shapes, group sizes from one tile's width down to a single column.
WIDER = [
    ((96, 128), 8),
    ((66, 96), 48),
    ((10, 96), 96),
    ((4, 1024), 1024),
    ((3, 1056), 352),
    ((33, 130), 10),
    ((5, 3, 2, 16), 16),
    ((1030,), 103),
    ((257, 36), None),
    ((2, 1, 2049), None),
]


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize(("shape", "group_size"), WIDER, ids=lambda v: str(v).replace(" ", ""))
def test_agrees_with_the_reference_on_ugly_shapes(
    shape: tuple[int, ...],
    group_size: int | None,
    nbits: float,
    axis: int,
    rng: torch.Generator,
    device: torch.device,
    launches: list[Tensor],
) -> None:
    q = random_qtensor(
        rng, device, nbits=nbits, shape=shape, group_size=group_size, axis=axis, dtype=torch.bfloat16
    )
    assert torch.equal(bits_of(dequantize_qtensor(q)), bits_of(q.dequantize()))
    assert launches


@pytest.mark.parametrize("nbits", [8, 4, 3, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_group_for_the_whole_tensor(
    nbits: float, dtype: torch.dtype, rng: torch.Generator, device: torch.device, launches: list[Tensor]
) -> None:
    q = random_qtensor(
        rng, device, nbits=nbits, shape=(7, 36), group_size=None, channel_wise=False, dtype=dtype
    )
    assert torch.equal(bits_of(dequantize_qtensor(q)), bits_of(q.dequantize()))
    assert launches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("quantised", ["scale", "zero", "both"])
def test_quantised_scale_and_zero(
    quantised: str,
    nbits: float,
    axis: int,
    dtype: torch.dtype,
    rng: torch.Generator,
    device: torch.device,
    launches: list[Tensor],
) -> None:
    q = random_qtensor(
        rng,
        device,
        nbits=nbits,
        shape=(16, 96),
        group_size=24,
        axis=axis,
        dtype=dtype,
        quant_scale=quantised != "zero",
        quant_zero=quantised != "scale",
    )
    assert torch.equal(bits_of(dequantize_qtensor(q, dtype)), bits_of(q.dequantize(dtype)))
    assert len(launches) == 1, "scale and zero are dequantised in the same launch"


# With 16 groups of scales, small tiles lie within a run of them; the shipped ones do not.
@pytest.mark.parametrize("small_tiles", [False, True])
@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("shape", [(16, 512), (17, 516)], ids=str)
def test_quantised_scales_in_many_groups(
    shape: tuple[int, int],
    axis: int,
    small_tiles: bool,
    rng: torch.Generator,
    device: torch.device,
    launches: list[Tensor],
) -> None:
    q = random_qtensor(
        rng, device, nbits=4, shape=shape, group_size=4, axis=axis, quant_scale=True, quant_zero=True
    )
    assert isinstance(q.scale, QTensor) and q.scale.spec.grouping.num_groups > 15
    config = None if not small_tiles else (64, 1, 2) if axis == 1 else (16, 1, 2)
    result, expected = dequantize_qtensor(q, torch.float16, config=config), q.dequantize(torch.float16)
    assert torch.equal(bits_of(result), bits_of(expected))
    assert len(launches) == 1


@pytest.mark.parametrize("stat_axis", [1, 0])
@pytest.mark.parametrize("stat_bits", [8, 4, 3])
def test_statistics_of_other_settings(
    stat_bits: float, stat_axis: int, rng: torch.Generator, device: torch.device, launches: list[Tensor]
) -> None:
    q = random_qtensor(rng, device, nbits=4, shape=(40, 96), group_size=32)
    shape = q.spec.grouping.stat_shape
    q.scale = quantised_stat(shape, rng, device, torch.float16, top=0.1, nbits=stat_bits, axis=stat_axis)
    assert torch.equal(bits_of(dequantize_qtensor(q)), bits_of(q.dequantize()))
    assert launches


@pytest.mark.parametrize("nbits", [8, 4, 3, 1])
@pytest.mark.parametrize("view_dtype", DTYPES, ids=str)
def test_codes_viewed_as_float(
    nbits: float, view_dtype: torch.dtype, rng: torch.Generator, device: torch.device, launches: list[Tensor]
) -> None:
    q = random_qtensor(rng, device, nbits=nbits, shape=(24, 64), group_size=32)
    expected = q.dequantize()
    q.W_q = q.W_q.view(view_dtype)
    assert torch.equal(bits_of(dequantize_qtensor(q)), bits_of(expected))
    assert launches


@pytest.mark.parametrize(
    ("compute", "zero", "scale"), list(itertools.permutations((torch.float16, torch.bfloat16, torch.float32)))
)
def test_roundings_follow_promotion(
    compute: torch.dtype,
    zero: torch.dtype,
    scale: torch.dtype,
    rng: torch.Generator,
    device: torch.device,
    launches: list[Tensor],
) -> None:
    q = random_qtensor(rng, device, nbits=4, shape=(24, 64), group_size=32, dtype=torch.float32)
    assert isinstance(q.scale, Tensor) and isinstance(q.zero, Tensor)
    q.scale, q.zero = q.scale.to(scale), q.zero.to(zero)
    result, expected = dequantize_qtensor(q, compute), q.dequantize(compute)
    assert result.dtype == expected.dtype
    assert torch.equal(bits_of(result), bits_of(expected))
    half = dequantize_qtensor(q, compute, out_dtype=torch.bfloat16)
    assert torch.equal(bits_of(half), bits_of(expected.to(torch.bfloat16)))
    assert len(launches) == 2


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("nbits", [8, 4, 3, 1])
def test_addresses_of_64_bits(
    nbits: float,
    axis: int,
    rng: torch.Generator,
    device: torch.device,
    launches: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hqq.kernels import dequant_launch

    monkeypatch.setattr(dequant_launch, "_INT32_LIMIT", 0)
    for shape, group_size in (((96, 48), 24), ((8, 24), 8), ((7, 9), None)):
        q = random_qtensor(rng, device, nbits=nbits, shape=shape, group_size=group_size, axis=axis)
        assert torch.equal(bits_of(dequantize_qtensor(q)), bits_of(q.dequantize()))
    assert len(launches) == 3


# The last ones: stripes of two tiles (the last one narrower), inputs asked for ahead, spread or in phases, hints for
# large results, overlap, few programs at a time.
CONFIGS = [
    (64, 1, 1),
    (256, 2, 3),
    (1024, 4, 2),
    (4096, 8, 5),
    (16, 1, 2, 2, 0, 0, 1, 0),
    (16, 1, 1, 2, 3, 2, 1, 1),
    (64, 2, 2, 0, 2, 1, 0, 2),
    (16, 1, 1, 2, 2, 4, 1, 3, 4),
    (16, 1, 2, 0, 2, 2, 0, 3, 2),
    (16, 1, 2, 3, 2, 2, 1, 3, 4, 5),
    (8, 1, 1, 0, 0, 0, 0, 3),
    (4, 1, 1, 5, 0, 0, 1, 1),
]


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_any_tile_size_gives_the_same_bits(
    config: tuple[int, ...],
    axis: int,
    rng: torch.Generator,
    device: torch.device,
    launches: list[Tensor],
) -> None:
    for nbits in (8, 4, 3):
        q = random_qtensor(rng, device, nbits=nbits, shape=(35, 48), group_size=48, axis=axis)
        assert torch.equal(bits_of(dequantize_qtensor(q, config=config)), bits_of(q.dequantize()))
    assert len(launches) == 3


def test_statistics_that_are_not_contiguous_are_copied(
    rng: torch.Generator, device: torch.device, launches: list[Tensor]
) -> None:
    q = random_qtensor(rng, device, nbits=4, shape=(16, 64), group_size=32)
    expected = q.dequantize()
    assert isinstance(q.scale, Tensor) and isinstance(q.zero, Tensor)
    q.scale = torch.stack([q.scale, q.scale + 1], dim=-1)[..., 0]
    q.zero = q.zero.repeat_interleave(3, dim=0)[::3]
    assert not q.scale.is_contiguous() and not q.zero.is_contiguous()
    assert torch.equal(bits_of(dequantize_qtensor(q)), bits_of(expected))
    assert launches


# The grid of the stand-alone kernel that this one grew out of.
SEED_BLOCKS: tuple[int | None, ...] = (32, 64, 128, 256, 512, 1024, None)


@pytest.mark.parametrize("block_size", SEED_BLOCKS)
@pytest.mark.parametrize("quant_zero", [False, True], ids=["zero", "quant_zero"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("nbits", [8, 4])
def test_seed_grid(
    nbits: int,
    axis: int,
    dtype: torch.dtype,
    quant_zero: bool,
    block_size: int | None,
    rng: torch.Generator,
    device: torch.device,
    launches: list[Tensor],
) -> None:
    shape = (1024, 1024) if device.type == "cuda" else (4, 128)
    q = random_qtensor(rng, device, nbits=nbits, shape=shape, axis=axis, dtype=dtype, quant_zero=quant_zero)
    spec = q.spec
    result = dequantize(
        q.W_q,
        q.scale,
        q.zero,
        nbits=nbits,
        shape=shape,
        group_size=spec.group_size,
        axis=axis,
        block_size=block_size,
        autotune=block_size is None,
    )
    assert torch.equal(bits_of(result), bits_of(q.dequantize(dtype)))
    assert launches
