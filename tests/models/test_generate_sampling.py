"""Sampling: the filters against transformers' own, and the frequencies of what is drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hqq.errors import ConfigError
from hqq.models.generation.sampling import Sampling

transformers = pytest.importorskip("transformers")
from transformers.generation import logits_process as oracle  # noqa: E402

V = 60


def decided(settings: dict[str, Any], rng: torch.Generator) -> torch.Tensor:
    """Return random logits [V] where top-p ends beyond doubt: transformers sums from the other end.

    Sums of up to V probabilities in float32 are off by less than V * 2^-23.
    """
    while True:
        logits = 3 * torch.randn(V, generator=rng)
        ordered = logits.double().sort(descending=True).values[: settings.get("top_k", V)]
        masses = (ordered / settings.get("temperature", 1.0)).softmax(0).cumsum(0)
        if float((masses - settings.get("top_p", 2.0)).abs().min()) > V * 2.0**-23:
            return logits


@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        ({"temperature": 0.3}, [oracle.TemperatureLogitsWarper(0.3)]),
        ({"top_k": 7}, [oracle.TopKLogitsWarper(7)]),
        ({"top_k": 1000}, [oracle.TopKLogitsWarper(1000)]),
        ({"top_p": 0.7}, [oracle.TopPLogitsWarper(0.7)]),
        ({"top_p": 1e-6}, [oracle.TopPLogitsWarper(1e-6)]),
        ({"min_p": 0.2}, [oracle.MinPLogitsWarper(0.2)]),
        (
            {"temperature": 1.7, "top_k": 30, "top_p": 0.9, "min_p": 0.1},
            [
                oracle.TemperatureLogitsWarper(1.7),
                oracle.TopKLogitsWarper(30),
                oracle.TopPLogitsWarper(0.9),
                oracle.MinPLogitsWarper(0.1),
            ],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_filters_are_those_of_transformers(
    settings: dict[str, Any], warpers: list[Any], rng: torch.Generator
) -> None:
    logits = torch.stack([decided(settings, rng) for _ in range(8)])
    expected = logits.clone()
    for warper in warpers:
        expected = warper(torch.zeros(8, 1, dtype=torch.long), expected)
    torch.testing.assert_close(Sampling(True, **settings).scores(logits), expected, rtol=0, atol=0)


def test_penalty_is_that_of_transformers_and_leaves_other_tokens(rng: torch.Generator) -> None:
    logits = torch.randn(4, V, generator=rng)
    ids = torch.randint(V, (4, 9), generator=rng)
    seen = torch.zeros(4, V, dtype=torch.bool).scatter(1, ids, True)
    expected = oracle.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    got = Sampling(False, repetition_penalty=1.3).scores(logits, seen)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert torch.equal(got[~seen], logits[~seen])


def test_frequencies_are_the_probabilities(rng: torch.Generator) -> None:
    draws = 40_000
    logits = torch.randn(1, 12, generator=rng)
    sampling = Sampling(True, temperature=0.8, top_k=6)
    noise = torch.empty(draws, 12).exponential_(generator=rng)
    counts = sampling.choose(logits.expand(draws, -1), noise).flatten().bincount(minlength=12).double()
    p = sampling.scores(logits)[0].double().softmax(-1)
    assert counts[p == 0].sum() == 0
    # Six standard deviations of a binomial count: one false alarm in some 10^7 runs.
    assert ((counts - draws * p).abs() <= 6 * (draws * p * (1 - p)).sqrt()).all()


def test_a_draw_of_zero_picks_no_excluded_token(rng: torch.Generator) -> None:
    logits = torch.randn(3, V, generator=rng)
    chosen = Sampling(True, top_k=1).choose(logits, torch.zeros(3, V))
    assert torch.equal(chosen[:, 0], logits.argmax(-1))


def test_greedy_ignores_temperature_and_zero_temperature_is_greedy(rng: torch.Generator) -> None:
    logits = torch.randn(5, V, generator=rng)
    for sampling in (Sampling(False, temperature=3.0, top_k=2), Sampling(True, temperature=0.0)):
        assert not sampling.draws
        assert torch.equal(sampling.choose(logits)[:, 0], logits.argmax(-1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "got temperature=-0.1; expected 0"),
        ({"top_k": 0}, "got top_k=0; expected at least 1"),
        ({"top_p": 0.0}, "got top_p=0.0; expected above 0"),
        ({"top_p": 1.1}, "got top_p=1.1"),
        ({"min_p": -1.0}, "got min_p=-1.0; expected from 0 to 1"),
        ({"repetition_penalty": 0.0}, "got repetition_penalty=0.0; expected above 0"),
    ],
)
def test_values_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(True, **settings)  # type: ignore[arg-type]
