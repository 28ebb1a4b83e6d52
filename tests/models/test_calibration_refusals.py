"""What calibration refuses, in whose name, and what it says to do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hqq import Calibration, QuantConfig, quantize_model
from hqq.errors import ConfigError, WeightError
from tests.cli.tiny_lm import byte_tokenizer
from tests.models.zoo import build, llama

CONFIG = QuantConfig(nbits=4, group_size=16)
FEW: dict[str, Any] = {"sequences": 4, "length": 40}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("selfish", "expected 'self', 'random'"),
        (3, "got int as calibration data"),
        ([], "not empty"),
        (["a text"], "no tokenizer"),
        ([{1, 2}], "got a calibration batch of type set"),
    ],
)
def test_data_that_is_none(rng: torch.Generator, data: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        quantize_model(llama(rng)[0], CONFIG, calibration=data, progress=False)


@pytest.mark.parametrize(
    "option", [{"sequences": 0}, {"length": 1}, {"batch_size": 2.0}, {"damping": 0.0}, {"correction": 2}]
)
def test_options_out_of_range(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"got {next(iter(option))}="):
        Calibration("self", **option)


def test_models_without_text(rng: torch.Generator) -> None:
    with pytest.raises(ConfigError, match="BertForSequenceClassification, which writes no text; pass inputs"):
        quantize_model(build("bert", rng)[0], CONFIG, calibration="self", progress=False)
    mlp = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    with pytest.raises(ConfigError, match="Sequential, which takes no token ids"):
        quantize_model(mlp, CONFIG, calibration="random", progress=False)


@pytest.mark.parametrize("text", ["", "too short", "x" * 13])
def test_a_text_that_is_too_short_says_how_much_is_needed(rng: torch.Generator, text: str) -> None:
    from tests.cli.tiny_lm import tiny_llama

    settings = Calibration([text], tokenizer=byte_tokenizer(), length=12)
    need = "1 sequence.* of 12 need 12" if len(text) < 12 else "of 96 inputs needs at least 32"
    with pytest.raises(ConfigError, match=rf"got .*{len(text) // 13 * 12 or len(text)} tokens.*{need}"):
        quantize_model(tiny_llama(), CONFIG, calibration=settings, progress=False)


def test_given_texts(rng: torch.Generator) -> None:
    from tests.cli.tiny_lm import tiny_llama

    texts = [bytes(torch.randint(32, 127, (300,), generator=rng).tolist()).decode() for _ in range(2)]
    settings = Calibration(texts, tokenizer=byte_tokenizer(), length=40)
    report = quantize_model(tiny_llama(), CONFIG, calibration=settings, progress=False)
    assert sum(row.fallback is None for row in report.layers) > 10


def test_too_few_tokens(rng: torch.Generator) -> None:
    tokens = torch.randint(3, 96, (1, 20), generator=rng)
    with pytest.raises(
        ConfigError, match="got 20 tokens to calibrate with; a layer of 64 inputs needs at least 32"
    ):
        quantize_model(llama(rng)[0], CONFIG, calibration=tokens, progress=False)


def test_weights_that_are_not_finite_are_named_before_anything_runs(rng: torch.Generator) -> None:
    model, _ = llama(rng)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WeightError, match=r"model\.layers\.1\.mlp\.up_proj: got a weight with NaN"):
        quantize_model(model, CONFIG, calibration=Calibration("random", **FEW), progress=False)
    assert all(
        torch.equal(before[key], value) for key, value in model.state_dict().items() if "layers.0" in key
    )


def test_activations_that_are_not_finite_name_the_layer(rng: torch.Generator) -> None:
    model, _ = llama(rng)
    model.model.layers[1].post_attention_layernorm.weight.data[5] = float("inf")
    with pytest.raises(
        WeightError, match=r"model\.layers\.1\.mlp\.gate_proj: got activations with NaN, infinite"
    ):
        quantize_model(model, CONFIG, calibration=Calibration("random", **FEW), progress=False)


def test_a_model_that_writes_nonsense_says_so(rng: torch.Generator) -> None:
    model, _ = llama(rng)
    model.model.norm.weight.data[5] = float("nan")
    with pytest.raises(WeightError, match="logits with NaN or infinite values from the full model"):
        quantize_model(model.eval(), CONFIG, calibration=Calibration("self", **FEW), progress=False)
