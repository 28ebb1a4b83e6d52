"""The sampling kernel draws what `Sampling` draws from the same noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hqq.models.generation.sampling import Sampling
from tests.choices import may_choose

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top_k": {"top_k": 5},
    "top_k of one": {"top_k": 1},
    "top_k of all": {"top_k": 10**6},
    "top_p": {"top_p": 0.8},
    "narrow top_p": {"top_p": 1e-4},
    "min_p": {"min_p": 0.05},
    "hot": {"temperature": 3.0, "top_p": 0.99},
    "all": {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
    "greedy with a penalty": {"do_sample": False, "repetition_penalty": 2.0},
}


def drawn(
    logits: Tensor, sampling: Sampling, noise: Tensor, seen: Tensor | None, finished: list[bool] | None = None
) -> Tensor:
    from hqq.kernels.decode_advance import Rows
    from hqq.kernels.decode_choose import ChoiceSpace, choose_next
    from hqq.kernels.decode_logits import Filters

    count, V = logits.shape
    device = logits.device
    filters = Filters(
        sampling.draws,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        sampling.repetition_penalty,
    )
    rows = Rows(
        token=torch.full((count, 1), -7, device=device),
        finished=torch.tensor(finished or [False] * count, device=device),
        ids=torch.full((count, 4), -1, device=device),
        positions=torch.ones(count, dtype=torch.int32, device=device),
        ends=torch.tensor([], dtype=torch.long, device=device),
        pad=V + 5,
    )
    space = ChoiceSpace.make(count, V, device)
    for poisoned in (space.best, space.limit.tops, space.limit.masses):
        poisoned.fill_(float("nan"))
    choose_next(logits, rows, filters, noise, seen, space)
    assert not space.arrived.any()
    assert torch.equal(rows.ids[:, 2:3], rows.token)
    assert rows.positions.tolist() == [2] * count
    return rows.token


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_what_the_reference_draws(
    settings: str, dtype: torch.dtype, rng: torch.Generator, device: torch.device
) -> None:
    sampling = Sampling(**{"do_sample": True, **SETTINGS[settings]})
    rows, V = 2, 5001
    logits = (torch.randn(rows, V, generator=rng) * 3).to(device, dtype)
    # No two logits of a row are the same: where top-p ends among equal ones is a matter of order.
    logits = torch.stack([_distinct(row) for row in logits])
    noise = torch.empty(rows, V).exponential_(generator=rng).to(device)
    seen = (torch.rand(rows, V, generator=rng) < 0.2).to(device) if sampling.remembers else None
    before = None if seen is None else seen.clone()
    token = drawn(logits, sampling, noise, seen)
    for row in range(rows):
        # The same logits in both: what the arithmetic between them and the choice loses is `may_choose`'s own.
        of_row = None if before is None else before[row]
        assert may_choose(sampling, logits[row].float(), int(token[row]), 0.0, noise[row], of_row)
    if seen is not None and before is not None:
        assert torch.equal(seen, before.scatter(1, token, True))


def _distinct(row: Tensor) -> Tensor:
    """Return `row` with all but the first of equal values -inf."""
    found: set[float] = set()
    values = row.tolist()
    for place, value in enumerate(values):
        if value in found:
            values[place] = float("-inf")
        found.add(value)
    return torch.tensor(values, dtype=row.dtype, device=row.device)


def test_finished_rows_get_padding(rng: torch.Generator, device: torch.device) -> None:
    logits = torch.randn(3, 70, generator=rng).to(device)
    noise = torch.ones(3, 70, device=device)
    got = drawn(logits, Sampling(True, top_k=3), noise, None, finished=[False, True, False])
    best = logits.argmax(-1).tolist()
    assert got[:, 0].tolist() == [best[0], 75, best[2]]


def test_equal_logits_at_the_limit_all_stay(device: torch.device) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, -0.0, 0.0]], device=device)
    for place in (2, 3, 4):
        noise = torch.full((1, 7), 50.0, device=device)
        noise[0, place] = 1e-3
        for sampling in (Sampling(True, top_k=2), Sampling(True, top_p=0.6)):
            assert drawn(logits, sampling, noise, None).item() == place
    noise = torch.full((1, 7), 50.0, device=device)
    noise[0, 0] = 1e-6
    assert drawn(logits, Sampling(True, top_k=4), noise, None).item() != 0
