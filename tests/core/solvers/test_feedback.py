"""Error feedback against its definition: one column after the other, the rest moved to the optimum that is left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hqq.core.bitpack import FORMAT_OF_BITS
from hqq.core.qtensor import QSpec
from hqq.core.solvers import Solution, solve_min_max
from hqq.core.solvers.als import solve_als
from hqq.core.solvers.feedback import (
    SolveGroups,
    can_follow,
    corrected,
    factorise,
    output_error,
    solve_with_feedback,
)
from hqq.core.solvers.feedback_refit import refit

N, K, ROWS = 48, 192, 900


@pytest.fixture
def moments(rng: torch.Generator) -> Tensor:
    """Second moments of inputs that depend on each other, as those of layers do."""
    mixed = torch.randn(ROWS, K // 4, generator=rng) @ torch.randn(K // 4, K, generator=rng)
    X = mixed + 2 * torch.randn(ROWS, K, generator=rng)
    return X.t() @ X


def spec_of(nbits: float, group_size: int | None, axis: int) -> QSpec:
    length = group_size if group_size is not None else (K if axis == 1 else N)
    return QSpec(nbits, (N, K), length, axis, FORMAT_OF_BITS[nbits])


def als(max_code: int, dtype: torch.dtype = torch.bfloat16) -> SolveGroups:
    def solve(groups: Tensor, importance: Tensor | None) -> Solution:
        weights = None if importance is None else importance[:, None].expand_as(groups)
        return solve_als(groups, 0, max_code, storage_dtype=dtype, importance=weights)

    return solve


def values(found: Solution, spec: QSpec) -> Tensor:
    return spec.grouping.ungroup((found.codes - found.zero) * found.scale)


def surgeon(W: Tensor, H: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """Return the codes [N, K] by the definition (Hassibi & Stork 1993), in float64; scale and zero for each weight.

    With columns of the weight fixed up to k, the others go to where the error of the outputs is least: a linear
    system in H's lower right corner, solved anew for every column.
    """
    W, H, scale, zero = W.double().clone(), H.double(), scale.double(), zero.double()
    original, codes = W.clone(), torch.zeros_like(W)
    for k in range(K):
        codes[:, k] = (W[:, k] / scale[:, k] + zero[:, k]).round().clamp(0, max_code)
        W[:, k] = (codes[:, k] - zero[:, k]) * scale[:, k]
        pull = (W - original)[:, : k + 1] @ H[: k + 1, k + 1 :]
        W[:, k + 1 :] = original[:, k + 1 :] - torch.linalg.solve(H[k + 1 :, k + 1 :], pull.t()).t()
    return codes


def test_the_factor_is_that_of_the_inverse(moments: Tensor) -> None:
    factor = factorise(moments, 0.01)
    assert factor is not None
    assert factor.damping == 0.01
    damped = moments.double() + 0.01 * moments.double().diagonal().mean() * torch.eye(K, dtype=torch.float64)
    U = factor.U.double()
    assert torch.equal(U, U.triu())
    condition = torch.linalg.cond(damped).item()
    # Backward stable in float32: the error is of the order of its precision times the condition number.
    assert (U.t() @ U @ damped - torch.eye(K)).abs().max() < 2.0**-23 * K * condition


@pytest.mark.parametrize("rows", [1, K // 3])
def test_fewer_inputs_than_columns_have_a_factor_too(rng: torch.Generator, rows: int) -> None:
    X = torch.randn(rows, K, generator=rng)
    factor = factorise(X.t() @ X, 0.01)
    assert factor is not None
    assert bool(torch.isfinite(factor.U).all())


def test_no_factor_without_inputs_or_with_infinite_ones() -> None:
    assert factorise(torch.zeros(K, K)) is None
    assert factorise(torch.full((K, K), float("inf"))) is None


def test_an_indefinite_matrix_takes_more_damping_or_has_none(moments: Tensor) -> None:
    mean = moments.diagonal().mean()
    lowest = torch.linalg.eigvalsh(moments.double()).min().float()
    slightly = moments - (lowest + 0.03 * mean) * torch.eye(K)
    factor = factorise(slightly, 0.01)
    assert factor is not None
    assert factor.damping == pytest.approx(0.1)
    assert factorise(moments - 10 * mean * torch.eye(K)) is None


@pytest.mark.parametrize("nbits", [4, 2, 1.58])
@pytest.mark.parametrize("axis", [0, 1])
def test_codes_are_those_of_the_definition(
    rng: torch.Generator, moments: Tensor, nbits: float, axis: int
) -> None:
    W, spec = torch.randn(N, K, generator=rng), spec_of(nbits, 16, axis)
    factor = factorise(moments, 0.05)
    assert factor is not None
    start = solve_min_max(spec.grouping.group(W), axis, spec.max_code)
    found = solve_with_feedback(W, factor.U, spec, als(spec.max_code), (start.scale, start.zero))
    damped = moments + 0.05 * moments.diagonal().mean() * torch.eye(K)
    scale, zero = (
        spec.grouping.ungroup(stat.expand(spec.grouping.matrix_shape)) for stat in (start.scale, start.zero)
    )
    expected = surgeon(W, damped, scale, zero, spec.max_code)
    codes = spec.grouping.ungroup(found.codes)
    # A value next to a boundary may fall on either side in float32, and takes the rest of its row with it.
    alike = (codes == expected).all(1).double().mean()
    assert alike > 0.8
    errors = [output_error(W - (q - zero) * scale, damped) for q in (codes, expected.float())]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("nbits", [4, 3, 2, 1])
@pytest.mark.parametrize(
    ("group_size", "axis"), [(64, 1), (16, 1), (96, 1), (None, 1), (48, 0), (16, 0), (None, 0), (128, 1)]
)
def test_the_error_of_the_outputs_falls(
    rng: torch.Generator, moments: Tensor, nbits: float, group_size: int | None, axis: int
) -> None:
    W, spec = torch.randn(N, K, generator=rng), spec_of(nbits, group_size, axis)
    factor = factorise(moments)
    assert factor is not None
    data_free = solve_als(spec.grouping.group(W), axis, spec.max_code, storage_dtype=torch.bfloat16)
    # Groups of 128 reach over two rows of 192: scale and zero stay, codes are searched for.
    fixed = None if can_follow(spec) else (data_free.scale, data_free.zero)
    assert (fixed is None) == (group_size != 128)
    found = solve_with_feedback(W, factor.U, spec, als(spec.max_code), fixed)
    assert found.scale.shape == found.zero.shape == spec.grouping.stat_shape
    assert torch.equal(found.codes, found.codes.round().clamp(0, spec.max_code))
    for stat in (found.scale, found.zero):
        assert torch.equal(stat, stat.bfloat16().float())
    before, after = (output_error(W - values(s, spec), moments) for s in (data_free, found))
    assert after < 0.9 * before


@pytest.mark.parametrize("nbits", [4, 2, 1])
def test_refitted_scales_and_zeros_cost_no_row_anything(
    rng: torch.Generator, moments: Tensor, nbits: float
) -> None:
    W, spec = torch.randn(N, K, generator=rng), spec_of(nbits, 32, 1)
    factor = factorise(moments)
    assert factor is not None
    found = solve_with_feedback(W, factor.U, spec, als(spec.max_code))
    again = refit(W, moments, found, spec, torch.bfloat16)
    assert again.codes is found.codes
    for stat in (again.scale, again.zero):
        assert stat.shape == spec.grouping.stat_shape
        assert torch.equal(stat, stat.bfloat16().float())
    before, after = (W - values(s, spec) for s in (found, again))
    rows = [((E.double() @ moments.double()) * E.double()).sum(1) for E in (before, after)]
    assert bool((rows[1] <= rows[0] * (1 + 1e-4)).all())
    assert rows[1].sum() < 0.99 * rows[0].sum()


def test_the_refit_of_one_group_is_the_least_squares_fit(rng: torch.Generator, moments: Tensor) -> None:
    W, spec = torch.randn(N, K, generator=rng), spec_of(2, None, 1)
    start = solve_min_max(W, 1, 3)
    found = refit(W, moments, start, spec, torch.float32)
    L = torch.linalg.cholesky(moments.double())
    for row in range(N):
        q = start.codes[row].double()
        basis = torch.stack((q, torch.ones_like(q)), 1)
        scale, offset = torch.linalg.lstsq(L.t() @ basis, L.t() @ W[row].double()).solution
        if 0.3 * start.scale[row] < scale < 3 * start.scale[row]:
            assert found.scale[row].item() == pytest.approx(scale.item(), rel=1e-3)
            assert found.zero[row].item() == pytest.approx((-offset / scale).item(), abs=1e-2)


def test_inputs_that_do_not_depend_on_each_other_leave_nothing_to_gain(rng: torch.Generator) -> None:
    W, spec = torch.randn(N, K, generator=rng), spec_of(4, 64, 1)
    factor = factorise(3 * torch.eye(K))
    assert factor is not None
    data_free = solve_als(spec.grouping.group(W), 1, 15)
    found = solve_with_feedback(W, factor.U, spec, als(15, torch.float32))
    # The same search over the same values: only the order of sums differs.
    error, expected = ((W - values(s, spec)).square().sum().item() for s in (found, data_free))
    assert error == pytest.approx(expected, rel=1e-3)


def test_the_weight_stays_as_it_is(rng: torch.Generator, moments: Tensor) -> None:
    W, spec = torch.randn(N, K, generator=rng), spec_of(2, 64, 1)
    kept, factor = W.clone(), factorise(moments)
    assert factor is not None
    solve_with_feedback(W, factor.U, spec, als(3))
    assert torch.equal(W, kept)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_corrected_weight_is_the_least_squares_fit_to_the_full_outputs(
    rng: torch.Generator, share: float
) -> None:
    W = torch.randn(N, K, generator=rng)
    X = torch.randn(ROWS, K, generator=rng)
    shifted = X + 0.3 * torch.randn(ROWS, K, generator=rng)
    H, cross = shifted.t() @ shifted, (X - shifted).t() @ shifted
    factor = factorise(H, 1e-6)
    assert factor is not None
    fitted = torch.linalg.lstsq(shifted.double(), (X @ W.t()).double()).solution.t()
    expected = torch.lerp(W.double(), fitted, share)
    # Condition number of H about 6, sums of 900 terms in float32.
    torch.testing.assert_close(corrected(W, cross, factor.U, share).double(), expected, rtol=1e-3, atol=1e-3)
