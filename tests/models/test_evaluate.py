"""Perplexity against a slow computation of its own: one token at a time, in float64."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor, nn

from hqq.errors import ConfigError, HQQError, WeightError
from hqq.models.evaluate import perplexity
from hqq.models.text import generate_text
from tests.cli.tiny_lm import byte_tokenizer, tiny_llama


def some_text(length: int, seed: int) -> str:
    return "".join(random.Random(seed).choices("abcdefgh é\n", k=length))


@torch.no_grad()
def slow_nll(model: nn.Module, ids: list[int], window: int, stride: int) -> float:
    """Mean over tokens 1 ... n-1 of -log p(token | context), each from a forward pass of its own in float64."""
    model = model.double()
    last = len(ids) - 1
    losses = []
    for position in range(1, len(ids)):  # the token to predict
        # The first window that reaches it; window w reads tokens [start, start + window).
        start = 0
        while start + window < position:
            start = min(start + stride, last - window)
        logits = model(input_ids=torch.tensor([ids[start:position]])).logits[0, -1]
        losses.append(math.log(sum(math.exp(v) for v in logits.tolist())) - logits[ids[position]].item())
    assert len(losses) == last
    return math.fsum(losses) / last


@pytest.mark.parametrize(
    ("length", "window", "stride", "batch"),
    [
        (100, 16, 8, 3),
        (97, 16, 16, 2),  # no overlap, and a rest
        (65, 16, 16, 8),  # no overlap, no rest
        (90, 16, 5, 4),  # a stride that does not divide
        (40, 1, 1, 7),  # bigrams
        (30, 64, 32, 8),  # shorter than one window
        (2, 64, 1, 1),  # the shortest text there can be
    ],
)
def test_equals_the_sum_over_tokens(length: int, window: int, stride: int, batch: int) -> None:
    model, tokenizer = tiny_llama(length), byte_tokenizer()
    text = some_text(length, seed=length).replace("é", "e")
    ids = tokenizer(text)["input_ids"]
    result = perplexity(
        model, tokenizer, text, window=window, stride=stride, batch_size=batch, progress=False
    )
    expected = slow_nll(model, ids, min(window, len(ids) - 1), stride)
    assert result.tokens == len(ids) - 1
    # float32 forward passes: logits of size ~10, each off by some epsilons of it after a few hundred additions.
    assert result.nll == pytest.approx(expected, abs=1e-4)
    assert result.perplexity == pytest.approx(math.exp(result.nll), rel=1e-12)


def test_defaults_are_the_longest_context_and_half_of_it() -> None:
    model, tokenizer, text = tiny_llama(), byte_tokenizer(), some_text(300, 1)
    result = perplexity(model, tokenizer, text, progress=False)
    assert (result.window, result.stride) == (64, 32)
    assert result.nll == perplexity(model, tokenizer, text, window=64, stride=32, progress=False).nll


def test_max_tokens_predicts_the_beginning_only() -> None:
    model, tokenizer, text = tiny_llama(), byte_tokenizer(), some_text(300, 2).replace("é", "e")
    short = perplexity(model, tokenizer, text, max_tokens=100, progress=False)
    assert short.tokens == 100
    assert short.nll == pytest.approx(perplexity(model, tokenizer, text[:101], progress=False).nll, rel=1e-9)


class Unigram(nn.Module):
    """Gives every token the same logits whatever came before; knows neither configuration nor keyword arguments."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.row = nn.Parameter(logits)
        self.calls: list[int] = []

    def forward(self, input_ids: Tensor) -> Tensor:
        self.calls.append(input_ids.shape[0])
        return self.row.expand(*input_ids.shape, -1)


def test_a_bare_module_and_half_precision_logits() -> None:
    tokenizer, text = byte_tokenizer(), some_text(5000, 3)
    logits = torch.randn(258, dtype=torch.float64).to(torch.bfloat16)
    model = Unigram(logits)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    expected = (torch.logsumexp(logits.double(), 0) - logits.double()[ids[1:]]).mean().item()
    result = perplexity(model, tokenizer, text, window=128, batch_size=5, progress=False)
    # float32 log-softmax: each loss, of size ~10, is off by less than 258 epsilons of it; the sum adds nothing.
    assert result.nll == pytest.approx(expected, abs=10 * 258 * torch.finfo(torch.float32).eps)
    assert max(model.calls) == 5


def test_leaves_the_model_in_the_mode_it_was_in() -> None:
    model = tiny_llama().train()
    perplexity(model, byte_tokenizer(), some_text(80, 4), progress=False)
    assert model.training


@pytest.mark.parametrize("text", ["", "a"])
def test_too_short_a_text_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="needs at least two tokens"):
        perplexity(tiny_llama(), byte_tokenizer(), text, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 65}, "window=65; expected 1 to 64"),
        ({"window": 0}, "window=0; expected 1 to 64"),
        ({"window": 16, "stride": 17}, "stride=17 with window=16"),
        ({"stride": 0}, "stride=0"),
        ({"batch_size": 0}, "batch_size=0; expected at least 1"),
        ({"max_tokens": 0}, "max_tokens=0; expected at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        perplexity(tiny_llama(), byte_tokenizer(), some_text(200, 5), progress=False, **options)


def test_logits_that_are_not_numbers_are_an_error_and_huge_losses_are_infinite() -> None:
    tokenizer, text = byte_tokenizer(), some_text(200, 6)
    with pytest.raises(WeightError, match="not numbers"):
        perplexity(Unigram(torch.full((258,), math.nan)), tokenizer, text, progress=False)
    hopeless = Unigram(torch.cat([torch.full((1,), 1e4), torch.zeros(257)]))
    result = perplexity(hopeless, tokenizer, text, progress=False)
    assert result.nll == pytest.approx(1e4)
    assert result.perplexity == math.inf


def test_a_model_without_logits_for_every_token_is_an_error() -> None:
    class Classifier(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return torch.zeros(input_ids.shape[0], 2)

    with pytest.raises(HQQError, match="Classifier"):
        perplexity(Classifier(), byte_tokenizer(), some_text(50, 7), progress=False)


def test_greedy_text_takes_the_likeliest_token_each_time() -> None:
    model, tokenizer = tiny_llama(seed=1), byte_tokenizer()
    ids = tokenizer("abc")["input_ids"]
    length = len(ids)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
    expected = tokenizer.decode(ids[length:], skip_special_tokens=True)
    assert generate_text(model, tokenizer, "abc", max_new_tokens=12) == expected


def test_sampled_text_follows_the_seed_and_leaves_the_generator_alone() -> None:
    model, tokenizer = tiny_llama(seed=2), byte_tokenizer()
    options = {"max_new_tokens": 20, "temperature": 1.5}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = generate_text(model, tokenizer, "abc", seed=1, **options)
    assert torch.equal(before, torch.get_rng_state())
    assert first == generate_text(model, tokenizer, "abc", seed=1, **options)
    assert len({generate_text(model, tokenizer, "abc", seed=seed, **options) for seed in range(4)}) > 1
    greedy = generate_text(model, tokenizer, "abc", max_new_tokens=20)
    assert greedy == generate_text(model, tokenizer, "abc", max_new_tokens=20, temperature=2.0, top_k=1)
    assert greedy == generate_text(model, tokenizer, "abc", max_new_tokens=20, temperature=2.0, top_p=1e-6)


def test_an_empty_prompt_begins_with_the_first_token() -> None:
    model, tokenizer = tiny_llama(seed=3), byte_tokenizer()
    assert generate_text(model, tokenizer, "", max_new_tokens=5) == generate_text(
        model, tokenizer, "<s>", max_new_tokens=5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 62}, "use max_new_tokens=61 or less"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
    ],
)
def test_generation_settings_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate_text(tiny_llama(), byte_tokenizer(), "abc", **options)
    with pytest.raises(HQQError, match="cannot generate"):
        generate_text(nn.Linear(2, 2), byte_tokenizer(), "abc")
