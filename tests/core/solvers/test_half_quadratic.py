"""The half-quadratic solver against a plain re-statement of its iteration in numpy."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from hqq.core.optimize import optimize_weights_proximal, optimize_weights_proximal_legacy
from hqq.core.solvers import DEFAULT_SOLVER, SOLVERS, get_solver, half_quadratic
from hqq.core.solvers.half_quadratic import refine_zero, solve_half_quadratic
from hqq.core.solvers.min_max import min_max_lattice, solve_min_max
from hqq.errors import ConfigError
from tests.core.solvers.half_quadratic import restated


@pytest.mark.parametrize("size", [0.02, 1.0, 30.0])
@pytest.mark.parametrize("max_code", [255, 15, 7, 3, 2, 1])
@pytest.mark.parametrize("dim", [0, 1])
def test_trajectory(dim: int, max_code: int, size: float, rng: torch.Generator) -> None:
    """Large weights exercise the shrinkage: residuals above 0.17 survive it."""
    W = torch.randn(48, 64, generator=rng) * size
    start = min_max_lattice(W, dim, max_code)
    expected = restated(W.numpy(), start.inverse_scale.numpy(), start.zero.numpy(), dim, max_code, steps=3)
    for steps, (zeros, tied) in enumerate(expected, start=1):
        actual = refine_zero(W, start, dim, max_code, iterations=steps).numpy()
        # A value within rounding of the middle between two codes may go either way; everything else agrees to the
        # rounding of a float32 mean of numbers up to max_code.
        agree = np.abs(actual - zeros) <= 64 * 2.0**-24 * (np.abs(zeros) + max_code)
        assert (agree | tied).all()
    assert not expected[0][1].all()


@pytest.mark.parametrize("dim", [0, 1])
def test_it_stops_where_the_error_stops_falling(dim: int, rng: torch.Generator) -> None:
    W = torch.randn(32, 64, generator=rng) * 0.02
    start = min_max_lattice(W, dim, 7)
    by_steps = [refine_zero(W, start, dim, 7, iterations=steps) for steps in range(1, 25)]
    stopped = [steps for steps in range(1, 24) if torch.equal(by_steps[steps - 1], by_steps[steps])]
    errors = []
    for zero in [start.zero, *by_steps]:
        codes = (W * start.inverse_scale + zero).round().clamp(0, 7)
        errors.append(float((W - (codes - zero) / start.inverse_scale).abs().mean()))
    first = stopped[0] if stopped else 24
    # The zeros of step s come from looking at errors[s - 1]: as long as it goes on, those fall.
    assert all(later < earlier for earlier, later in pairwise(errors[: max(first - 1, 0)]))


@pytest.mark.parametrize("round_zero", [False, True])
@pytest.mark.parametrize("max_code", [255, 15, 3, 1])
@pytest.mark.parametrize("dim", [0, 1])
def test_codes_are_the_nearest_for_the_final_zero(
    dim: int, max_code: int, round_zero: bool, rng: torch.Generator
) -> None:
    W = torch.randn(32, 48, generator=rng)
    codes, scale, zero = (t.double() for t in solve_half_quadratic(W, dim, max_code, round_zero=round_zero))
    error = ((codes - zero) * scale - W.double()).abs()
    for other in (codes - 1, codes + 1):
        allowed = (other >= 0) & (other <= max_code)
        worse = ((other - zero) * scale - W.double()).abs() - error
        # in float32 the middle between two codes is known to a few units of zero and code
        assert bool(
            (worse[allowed] >= -(scale * (zero.abs() + max_code) * 2.0**-21).expand_as(W)[allowed]).all()
        )


def test_the_scale_is_that_of_min_max(rng: torch.Generator) -> None:
    W = torch.randn(32, 64, generator=rng)
    assert torch.equal(solve_half_quadratic(W, 1, 15).scale, solve_min_max(W, 1, 15).scale)


def test_the_start_only_is_rounded(rng: torch.Generator) -> None:
    W = torch.randn(32, 64, generator=rng)
    assert bool((solve_min_max(W, 1, 15, round_zero=True).zero % 1 == 0).all())
    assert not bool((solve_half_quadratic(W, 1, 15, round_zero=True).zero % 1 == 0).all())


@pytest.mark.parametrize("elements", [1, 1000, 5000])
@pytest.mark.parametrize("dim", [0, 1])
def test_blocks_do_not_show(
    dim: int, elements: int, monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    W = torch.randn(200, 64, generator=rng) if dim == 1 else torch.randn(64, 200, generator=rng)
    start = min_max_lattice(W, dim, 15)
    whole = [refine_zero(W, start, dim, 15, iterations=steps) for steps in (1, 2)]
    monkeypatch.setattr(half_quadratic, "_BLOCK_ELEMENTS", elements)
    blocks = list(half_quadratic._blocks(W, dim))
    assert len(blocks) > 1
    assert sum(W[block].numel() for block in blocks) == W.numel()
    for steps, expected in zip((1, 2), whole, strict=True):
        # sums of up to 64 codes, added in another order
        torch.testing.assert_close(
            refine_zero(W, start, dim, 15, iterations=steps), expected, rtol=0, atol=64 * 15 * 2.0**-24
        )


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("dim", [0, 1])
def test_same_input_same_bits(solver: str, dim: int, rng: torch.Generator) -> None:
    W = torch.randn(64, 64, generator=rng)
    first, second = (get_solver(solver)(W.clone(), dim, 15) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("dim", [0, 1])
def test_groups_are_solved_alike_wherever_they_stand(solver: str, dim: int, rng: torch.Generator) -> None:
    """A tensor of one group repeated stops as one, and gives every copy the same lattice."""
    one = torch.randn(1, 64, generator=rng)
    # Columns that fill no vector are summed in another order, and a value in the middle between two codes would lead
    # the half-quadratic iteration elsewhere; the others are made to give the same bits in any place.
    W = one.expand(64 if solver == "hqq" else 37, 64).contiguous()
    _, scale, zero = get_solver(solver)(W if dim == 1 else W.t().contiguous(), dim, 7)
    assert bool((scale == scale.flatten()[0]).all())
    assert bool((zero == zero.flatten()[0]).all())


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_the_weight_is_not_changed(solver: str, rng: torch.Generator) -> None:
    W = torch.randn(16, 64, generator=rng)
    before = W.clone()
    get_solver(solver)(W, 1, 15)
    assert torch.equal(W, before)


def test_the_registry() -> None:
    assert {"hqq", "minmax"} <= set(SOLVERS)
    assert get_solver(None) is SOLVERS[DEFAULT_SOLVER]
    with pytest.raises(ConfigError, match=r"got solver='magic'; expected one of .*hqq"):
        get_solver("magic")


class TestOriginalConvention:
    """`optimize_weights_proximal(tensor, scale, zero, min_max, axis)` with the scale inverted."""

    def start(self, rng: torch.Generator, size: float = 1.0) -> dict[str, Any]:
        W = torch.randn(32, 64, generator=rng) * size
        lattice = min_max_lattice(W, 1, 15)
        return {
            "tensor": W,
            "scale": lattice.inverse_scale,
            "zero": lattice.zero,
            "min_max": [0, 15],
            "axis": 1,
        }

    def test_is_the_solver(self, rng: torch.Generator) -> None:
        start = self.start(rng)
        codes, inverse_scale, zero = optimize_weights_proximal(**start)
        solution = solve_half_quadratic(start["tensor"], 1, 15)
        assert torch.equal(codes, solution.codes)
        assert torch.equal(zero, solution.zero)
        assert torch.equal(inverse_scale, start["scale"])
        assert optimize_weights_proximal_legacy is optimize_weights_proximal

    @pytest.mark.parametrize(
        "params", [{"lp_norm": 0.9}, {"beta": 1e4}, {"beta": 1e3, "lp_norm": 0.5}, {"lp_norm": 1.0}]
    )
    def test_parameters_count(self, params: dict[str, float], rng: torch.Generator) -> None:
        """With a large beta far smaller residuals survive the shrinkage than with the default."""
        start = self.start(rng, size=0.1)  # residuals up to 0.02
        _, _, zero = optimize_weights_proximal(**start, opt_params={**params, "iters": 1})
        expected = restated(
            start["tensor"].numpy(),
            start["scale"].numpy(),
            start["zero"].numpy(),
            1,
            15,
            p=params.get("lp_norm", 0.7),
            beta=params.get("beta", 10.0),
            steps=1,
        )
        zeros, tied = expected[-1]
        assert not tied.all()
        # Means of 64 numbers up to 15, twice.
        agree = np.abs(zero.numpy() - zeros) <= 2 * 64 * 15 * 2.0**-24
        assert (agree | tied).all()

    def test_iterations_are_counted(self, rng: torch.Generator) -> None:
        start = self.start(rng)
        _, _, zero = optimize_weights_proximal(**start, opt_params={"iters": 0})
        assert torch.equal(zero, start["zero"])
