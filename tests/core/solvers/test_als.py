"""The ALS solver against brute force, the other solvers, and what must not matter to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hqq.core.bitpack import SUPPORTED_BITS, max_code
from hqq.core.config import QuantConfig
from hqq.core.linear import HQQLinear
from hqq.core.quantizer import quantize_tensor
from hqq.core.solvers import Solution, als_storage, columns, get_solver
from hqq.core.solvers.als import solve_als
from hqq.core.solvers.half_quadratic import solve_half_quadratic
from hqq.core.solvers.min_max import solve_min_max
from hqq.errors import ConfigError, ShapeError, WeightError
from tests.core.solvers.judged import doubt, errors

MAX_CODES = tuple(max_code(bits) for bits in SUPPORTED_BITS)
HALF_DTYPES = (torch.bfloat16, torch.float16)
# (groups, length): the usual; short; odd; split into columns; split and padded; larger than a tile.
SIZES = ((520, 64), (1100, 8), (37, 33), (21, 640), (5, 1031), (2, 40000))


def trained_like(groups: int, length: int, rng: torch.Generator) -> Tensor:
    """Groups [G, gs] with the tails (Student's t, 5 degrees of freedom) and the uneven sizes of trained weights."""
    chi_square = torch.randn(5, groups, length, generator=rng).square().mean(0)
    W = torch.randn(groups, length, generator=rng) / chi_square.sqrt()
    return 0.02 * W * torch.exp(0.5 * torch.randn(groups, 1, generator=rng))


def no_worse(
    W: Tensor,
    found: Solution,
    other: Solution,
    dtype: torch.dtype = torch.float32,
    weights: Tensor | None = None,
) -> bool:
    """Whether no group's error is larger than on the other lattice, as far as float32 can tell the two apart."""
    mine, theirs = (errors(W, solution, dtype, weights) for solution in (found, other))
    return bool((mine <= theirs + doubt(W, found, dtype, weights) + doubt(W, other, dtype, weights)).all())


def uneven(count: int, spread: float, rng: torch.Generator) -> Tensor:
    """Weights [count] of a log-normal distribution, one for each of as many equal shares, in random order.

    Drawn freely, a few of them would decide how uneven all are.
    """
    shares = (torch.arange(count) + 0.5) / count
    return torch.exp(spread * torch.special.ndtri(shares))[torch.randperm(count, generator=rng)]


def brute_force(group: np.ndarray, top: int) -> float:
    """Least squared error of float64 values over 300 scales and 40 offsets, each with its offset fitted once."""
    low, high = group.min(), group.max()
    step = (high - low) / top
    best = np.inf
    for scale in step * np.linspace(0.1, 1.3, 300):
        slack = (high - low) - scale * top
        offsets = (low + slack / 2 + scale * np.linspace(-0.5, 0.5, 41)[:-1])[:, None]
        codes = np.clip(np.rint((group - offsets) / scale), 0, top)
        offsets = (group - codes * scale).mean(1, keepdims=True)
        best = min(best, np.square(codes * scale + offsets - group).sum(1).min())
    return float(best)


# How far groups may lie above brute force's 12000 lattices a group (the solver looks at 40): on average, and all but
# three of them. At 8 bits the least error is a matter of luck, and the more lattices are tried the better. Averages of
# 48 are eight standard deviations below and more. No group of 11520 lay beyond the second: four of 48 do once in 10^9.
CLOSENESS = {
    255: (1.25, 4.0),
    15: (1.03, 1.6),
    7: (1.02, 1.4),
    3: (1.01, 1.3),
    2: (1.01, 1.3),
    1: (1.01, 1.3),
}


@pytest.mark.parametrize("top", CLOSENESS)
def test_least_squares_comes_close_to_brute_force(
    top: int, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(als_storage, "EXTENT", 0.0)
    W = trained_like(48, 32, rng)
    found = errors(W, solve_als(W, 1, top))
    least = torch.tensor([brute_force(group, top) for group in W.double().numpy()])
    average, most = CLOSENESS[top]
    assert (found / least).mean() <= average
    assert int((found / least > most).sum()) <= 3


@pytest.mark.parametrize("top", [15, 7, 3, 2, 1])
def test_gives_back_three_quarters_of_the_lost_extent(
    top: int, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    W = trained_like(200, 64, rng)
    extent = {}
    for share in (0.0, als_storage.EXTENT):
        monkeypatch.setattr(als_storage, "EXTENT", share)
        found = solve_als(W, 1, top)
        fitted = (found.codes - found.zero) * found.scale
        extent[share] = ((fitted * W).sum(1) / W.square().sum(1)).double()
    lost = 1 - extent[0.0]
    # Least squares loses; rounding to the nearest codes afterwards, or min-max as it was, may leave a group as large.
    assert lost.median() > 0
    # The scale moves on a straight line from one extent to the other; a group may decline for its error's sake.
    given_back = (1 - (1 - extent[0.75]) / lost).median()
    assert given_back == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
@pytest.mark.parametrize(
    ("top", "size"),
    [(top, SIZES[0]) for top in MAX_CODES] + [(top, size) for size in SIZES[1:] for top in (255, 3)],
    ids=str,
)
def test_no_group_is_worse_than_min_max_nor_all_than_half_quadratic(
    top: int, size: tuple[int, int], dtype: torch.dtype, rng: torch.Generator
) -> None:
    W = trained_like(*size, rng)
    found = solve_als(W, 1, top, storage_dtype=dtype)
    assert no_worse(W, found, solve_min_max(W, 1, top, storage_dtype=dtype), dtype)
    # At 8 bits there is little to gain, and which of a few groups gains it is chance. Of 520 groups the sum is ten
    # standard deviations below, and at two bits that of 37 is eight.
    if size == SIZES[0] or (top == 3 and size[1] >= 32):
        other = solve_half_quadratic(W, 1, top, storage_dtype=dtype)
        assert errors(W, found, dtype).sum() <= errors(W, other, dtype).sum()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
@pytest.mark.parametrize("top", MAX_CODES)
def test_scale_and_zero_are_numbers_of_the_storage_dtype(
    top: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    W = trained_like(300, 64, rng)
    found = solve_als(W, 1, top, storage_dtype=dtype)
    for stat in (found.scale, found.zero):
        assert torch.equal(stat.to(dtype).float(), stat)
    assert (found.codes == found.codes.round()).all()
    assert found.codes.amin() >= 0
    assert found.codes.amax() <= top


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("top", [15, 3])
def test_axis_is_a_matter_of_layout(top: int, size: tuple[int, int], rng: torch.Generator) -> None:
    W = trained_like(*size, rng)
    rows, columns_ = solve_als(W, 1, top), solve_als(W.t().contiguous(), 0, top)
    for by_row, by_column in zip(rows, columns_, strict=True):
        assert torch.equal(by_row, by_column.t())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("top", [255, 7])
def test_a_group_is_solved_alike_in_any_company(
    top: int, size: tuple[int, int], rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    W = trained_like(*size, rng)
    whole = solve_als(W, 1, top)
    cut = size[0] // 3 + 1
    parts = [solve_als(part, 1, top) for part in (W[:cut], W[cut:])]
    for constant in ("_CPU_TILE_PER_THREAD", "_SERIAL_TILE"):
        monkeypatch.setattr(columns, constant, 9000)
    small_tiles = solve_als(W, 1, top)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if threads == 1 else 1)
        other_threads = solve_als(W, 1, top)
    finally:
        torch.set_num_threads(threads)
    for k, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[k] for part in parts]), expected)
        assert torch.equal(small_tiles[k], expected)
        assert torch.equal(other_threads[k], expected)


@pytest.mark.parametrize("size", [(1000, 64), (50, 1100), (16, 4096)], ids=str)
def test_how_many_threads_share_a_tile_does_not_matter(size: tuple[int, int], rng: torch.Generator) -> None:
    W = trained_like(*size, rng)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.append(solve_als(W, 1, 15))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("power", [-90, -20, 3, 90])
def test_powers_of_two_only_change_the_scale(power: int, rng: torch.Generator) -> None:
    W = trained_like(200, 64, rng)
    plain, scaled = solve_als(W, 1, 7), solve_als(W * 2.0**power, 1, 7)
    assert torch.equal(scaled.codes, plain.codes)
    assert torch.equal(scaled.zero, plain.zero)
    assert torch.equal(scaled.scale, plain.scale * 2.0**power)


@pytest.mark.parametrize("top", [15, 3])
def test_sign_and_order_do_not_matter_much(top: int, rng: torch.Generator) -> None:
    W = trained_like(600, 64, rng)
    plain = errors(W, solve_als(W, 1, top)).sum().item()
    # Ties are broken towards even codes and sums are rounded in order, so few groups end in another local minimum.
    assert errors(-W, solve_als(-W, 1, top)).sum().item() == pytest.approx(plain, rel=5e-3)
    shuffled = W[:, torch.randperm(64, generator=rng)]
    assert errors(shuffled, solve_als(shuffled, 1, top)).sum().item() == pytest.approx(plain, rel=5e-3)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equal_weights_are_no_weights(size: tuple[int, int], rng: torch.Generator) -> None:
    W = trained_like(*size, rng)
    plain = solve_als(W, 1, 7)
    for value in (1.0, 2.0**-40):
        weighted = solve_als(W, 1, 7, importance=torch.full_like(W, value))
        # Divided by the largest all are 1, sums of 1 are exact up to 2^24, and products with 1 are.
        for one, other in zip(weighted, plain, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("top", [15, 7, 3])
def test_weights_lower_the_weighted_error(top: int, rng: torch.Generator) -> None:
    W = trained_like(400, 64, rng)
    weights = uneven(64, 1.5, rng).expand_as(W)
    weighted = solve_als(W, 1, top, importance=weights)
    plain = solve_als(W, 1, top)
    ours, theirs = (errors(W, solution, weights=weights).sum() for solution in (weighted, plain))
    assert ours < 0.95 * theirs
    assert no_worse(W, weighted, solve_min_max(W, 1, top), weights=weights)
    by_column = solve_als(W.t().contiguous(), 0, top, importance=weights.t())
    assert torch.equal(by_column.codes.t(), weighted.codes)


def test_groups_without_any_weight_are_solved_as_if_unweighted(rng: torch.Generator) -> None:
    W = trained_like(9, 64, rng)
    weights = torch.ones_like(W)
    weights[3] = 0
    assert torch.equal(solve_als(W, 1, 3, importance=weights).codes, solve_als(W, 1, 3).codes)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_refuses_weights_that_are_none(bad: float) -> None:
    weights = torch.ones(4, 8)
    weights[2, 3] = bad
    with pytest.raises(WeightError, match="importance"):
        solve_als(torch.randn(4, 8), 1, 3, importance=weights)
    with pytest.raises(ShapeError, match="importance"):
        solve_als(torch.randn(4, 8), 1, 3, importance=weights[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top", [15, 7, 3, 2, 1])
def test_integer_zeros_beat_rounded_ones(top: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    W = trained_like(600, 64, rng)
    found = solve_als(W, 1, top, zero_mode="integer", storage_dtype=dtype)
    assert torch.equal(found.zero, found.zero.round())
    rounded = solve_min_max(W, 1, top, round_zero=True, storage_dtype=dtype)
    assert no_worse(W, found, rounded, dtype)
    # 0.93 of it at 4 bits, with a standard deviation of 0.005, and less at fewer.
    assert errors(W, found, dtype).sum() < 0.98 * errors(W, rounded, dtype).sum()


@pytest.mark.parametrize("mode", ["middle", "signed"])
@pytest.mark.parametrize("top", [15, 7, 3, 2])
def test_a_fixed_zero_searches_the_scale(top: int, mode: str, rng: torch.Generator) -> None:
    W = trained_like(900, 64, rng)
    found = solve_als(W, 1, top, zero_mode=mode)
    zero = {"middle": top / 2, "signed": (top + 1) // 2}[mode]
    assert (found.zero == zero).all()
    # The best of 400 scales, with nearest codes
    widest = W.abs().amax(1, keepdim=True) / (top / 2)
    least = torch.full((len(W),), torch.inf, dtype=torch.float64)
    for share in torch.linspace(0.1, 1.2, 400):
        scale = share * widest
        codes = (W / scale + zero).round().clamp(0, top)
        least = torch.minimum(least, errors(W, Solution(codes, scale, found.zero)))
    unbiased = W.double().square().sum(1) * least / (W.double().square().sum(1) - least)
    # Between 0.86 and 0.99 of it: what the scale gives up for extent is less than the least squares here do.
    assert errors(W, found).sum() <= 1.02 * unbiased.sum()


def test_refuses_an_unknown_zero_mode() -> None:
    with pytest.raises(ConfigError, match="zero_mode='half'"):
        solve_als(torch.randn(4, 8), 1, 3, zero_mode="half")


@pytest.mark.parametrize("mode", ["float", "integer", "middle", "signed"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
@pytest.mark.parametrize("top", MAX_CODES)
def test_degenerate_groups_give_numbers(
    top: int, dtype: torch.dtype, mode: str, rng: torch.Generator
) -> None:
    noise = torch.randn(8, 32, generator=rng)
    noise[0] = 0
    noise[1] = 1e-3 * noise[1] + 7  # offset dwarfs the range
    noise[2] *= 1e-6
    noise[3, 5] = 1e4
    noise[4] = (noise[4] > 0).float()
    noise[5] = 0.25
    noise[6] = -3
    noise[7, 1:] = 0
    found = solve_als(noise, 1, top, storage_dtype=dtype, zero_mode=mode)
    for tensor in found:
        assert torch.isfinite(tensor).all()
    if mode == "float":
        exact = errors(noise, found, dtype)
        assert (exact[[0, 5, 6]] == 0).all()


@pytest.mark.parametrize("size", [1e-42, 1e-37, 1e37, 3e38])
@pytest.mark.parametrize("top", [255, 7, 1])
def test_tiny_and_huge_weights_keep_their_quality(top: int, size: float, rng: torch.Generator) -> None:
    W = (2 * torch.rand(20, 64, generator=rng) - 1) * size
    found = solve_als(W, 1, top)
    for tensor in found:
        assert torch.isfinite(tensor).all()
    assert no_worse(W, found, solve_min_max(W, 1, top))


def test_refuses_what_is_not_finite() -> None:
    W = torch.randn(4, 32)
    W[2, 7] = torch.nan
    with pytest.raises(WeightError, match="NaN"):
        solve_als(W, 1, 15)


def test_is_the_default() -> None:
    assert get_solver(None) is solve_als


def test_quantise_takes_importance_per_input(rng: torch.Generator) -> None:
    W = trained_like(96, 128, rng)
    importance = uneven(128, 2.0, rng)
    for axis in (0, 1):
        plain, weighted = (
            quantize_tensor(W, nbits=3, group_size=32, axis=axis, importance=weights).dequantize(
                torch.float32
            )
            for weights in (None, importance)
        )
        squares = [((found - W).square() * importance).sum() for found in (weighted, plain)]
        # On axis 0 all inputs of a group are one, and its weights are equal.
        assert squares[0] < 0.9 * squares[1] if axis == 1 else torch.equal(weighted, plain)
    with pytest.raises(ShapeError, match=r"\[128\]"):
        quantize_tensor(W, nbits=3, importance=torch.ones(127))


def test_zero_mode_comes_through_the_configuration(rng: torch.Generator) -> None:
    config = QuantConfig(nbits=3, group_size=32, round_zero=False, zero_mode="integer")
    assert QuantConfig.from_dict(config.to_dict()) == config
    layer = torch.nn.Linear(64, 32, bias=False)
    quantised = HQQLinear(layer, config.to_dict(), compute_dtype=torch.float32, device="cpu")
    zero = quantised.meta["zero"]
    assert torch.equal(zero, zero.round())
    with pytest.raises(ConfigError, match="zero_mode"):
        QuantConfig(zero_mode="half")
    for other in ({"solver": "hqq"}, {"optimize": False}):
        with pytest.raises(ConfigError, match="zero_mode"):
            quantize_tensor(torch.randn(8, 64), zero_mode="integer", **other)


def test_solves_in_inference_mode_on_several_threads(rng: torch.Generator) -> None:
    W = trained_like(2000, 64, rng)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = solve_als(W.clone().requires_grad_().detach(), 1, 15)
        with torch.inference_mode():
            found = solve_als(W * 1.0, 1, 15)
        outside = solve_als(found.codes * 0 + W, 1, 15)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(outside.codes, expected.codes)
    assert not expected.scale.requires_grad
