"""The rounding kernel of error feedback against its torch reference."""

from __future__ import annotations

import pytest
import torch

from hqq.core.solvers import feedback_round
from hqq.kernels import feedback


@pytest.mark.parametrize(("count", "N"), [(64, 96), (50, 33), (7, 5), (1, 64)])
@pytest.mark.parametrize("shared", [True, False])
def test_codes_and_errors(
    rng: torch.Generator,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    N: int,
    shared: bool,
) -> None:
    columns = torch.randn(count, N, generator=rng)
    whole = torch.triu(0.1 * torch.randn(2 * count, 2 * count, generator=rng), 1) + 1.5 * torch.eye(2 * count)
    U = whole.to(device)[count:, count:]  # part of a larger factor
    scale = torch.rand(1 if shared else count, N, generator=rng) * 0.3 + 0.2
    zero = torch.rand(1 if shared else count, N, generator=rng) * 15
    columns, scale, zero = columns.to(device), scale.to(device), zero.to(device)
    assert feedback.takes(columns)
    found = [torch.full_like(columns, float("nan")) for _ in range(2)]
    feedback.round_columns(columns, U, scale, zero, 15, *found)
    expected = [torch.empty_like(columns) for _ in range(2)]
    monkeypatch.setattr(feedback_round, "_MODULES", {})
    feedback_round.round_columns(columns.clone(), U, scale, zero, 15, *expected)
    # A value next to a boundary may fall on either side, and takes the rest of its row with it. Float32 and float64
    # part in 6 of 200000 rows of 64 (the reference on both): three rows of 96 do once in 10^8 runs.
    alike = (found[0] == expected[0]).all(0)
    assert int((~alike).sum()) <= max(2, N / 10)
    # Sums of up to 64 terms below 1 in float32, each error a difference of numbers up to 8.
    torch.testing.assert_close(found[1][:, alike], expected[1][:, alike], rtol=1e-4, atol=64 * 2.0**-20)
    assert not bool(torch.isnan(found[0]).any() | torch.isnan(found[1]).any())


def test_long_stretches_are_left_to_the_reference(device: torch.device) -> None:
    assert not feedback.takes(torch.zeros(65, 8, device=device))
    assert not feedback.takes(torch.zeros(8, 8, device=device, dtype=torch.float64))
