"""One configuration, one per name, tag or glob, skip rules, and what is refused before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hqq import BaseQuantizeConfig, QuantConfig, quantize_model
from hqq.errors import ConfigError, DtypeError, HQQError, ShapeError, WeightError
from tests.models.zoo import build

Q4, Q3, Q8 = (QuantConfig(nbits=b, group_size=16) for b in (4, 3, 8))


def bits(report: Any) -> dict[str, float]:
    return {row.name: row.nbits for row in report.layers}


def test_the_dict_of_tags_quantises_what_it_names(rng: torch.Generator) -> None:
    model, _ = build("llama", rng)
    config = {
        "self_attn.q_proj": BaseQuantizeConfig(nbits=4, group_size=16),
        "mlp.down_proj": Q3,
        "mlp.up_proj": None,
    }
    report = quantize_model(model, config)
    assert bits(report) == {
        f"model.layers.{i}.{tag}": b
        for i in (0, 1)
        for tag, b in (("self_attn.q_proj", 4), ("mlp.down_proj", 3))
    }
    described = model.config.quantization_config["quant_config"]
    assert {tag: c["weight_quant_params"]["nbits"] for tag, c in described.items()} == {
        "self_attn.q_proj": 4,
        "mlp.down_proj": 3,
    }


def test_names_win_over_tags_over_globs_in_order(rng: torch.Generator) -> None:
    model, _ = build("llama", rng)
    config = {
        "*.up_proj": Q3,
        "model.layers.*": Q8,
        "mlp.down_proj": Q4,
        "model.layers.1.mlp.down_proj": None,
    }
    got = bits(quantize_model(model, config))
    assert got["model.layers.0.mlp.up_proj"] == 3
    assert got["model.layers.0.mlp.gate_proj"] == 8
    assert got["model.layers.0.mlp.down_proj"] == 4
    assert "model.layers.1.mlp.down_proj" not in got
    assert "lm_head" not in got


def test_naming_the_head_wins_over_the_default_skip(rng: torch.Generator) -> None:
    model, _ = build("llama", rng)
    assert bits(quantize_model(model, {"lm_head": Q8})) == {"lm_head": 8}


@pytest.mark.parametrize("rule", ["down_proj", "mlp.down_proj", "*.down_proj", "down_pr"])
def test_skip(rule: str, rng: torch.Generator) -> None:
    model, _ = build("llama", rng)
    report = quantize_model(model, Q4, skip=("lm_head", rule))
    assert not any("down_proj" in name for name in bits(report))
    assert sum("up_proj" in name for name in bits(report)) == 2
    assert {row.reason for row in report.left if "down_proj" in row.name} == {f"skipped by {rule!r}"}


def unchanged(model: nn.Module) -> Callable[[], bool]:
    """Return a function that tells whether `model` is still what it is now."""
    kinds = {name: type(module) for name, module in model.named_modules()}
    tensors = {name: (p.data_ptr(), p.device, p.dtype) for name, p in model.named_parameters()}

    def check() -> bool:
        return (
            {name: type(module) for name, module in model.named_modules()} == kinds
            and {name: (p.data_ptr(), p.device, p.dtype) for name, p in model.named_parameters()} == tensors
            and not hasattr(model, "hqq_quantized")
        )

    return check


@pytest.mark.parametrize(
    ("config", "options", "error", "message"),
    [
        (
            {"mlp.down_proj": Q4, "mlp.dwn_proj": Q4},
            {},
            ConfigError,
            r"'mlp.dwn_proj'.*self_attn.q_proj.*mlp.down_proj",
        ),
        ({"model.layer.*": Q4}, {}, ConfigError, "model.layer"),
        ({}, {}, ConfigError, "expected QuantConfig"),
        ("4bit", {}, ConfigError, "expected QuantConfig"),
        ({"mlp.down_proj": 4}, {}, ConfigError, r"mlp.down_proj: got 4; expected QuantConfig"),
        (
            QuantConfig(group_size=48),
            {},
            ConfigError,
            r"q_proj: group_size=48 does not divide the 1024 elements.*use one",
        ),
        (
            {"mlp.*": Q4, "mlp.down_proj": QuantConfig(group_size=3)},
            {},
            ConfigError,
            "down_proj: group_size=3",
        ),
        (QuantConfig(group_size=1, view_as_float=True), {}, ConfigError, "q_proj: got view_as_float"),
        (Q4, {"compute_dtype": torch.int8}, DtypeError, "q_proj: got compute_dtype"),
        (Q4, {"device": []}, ConfigError, "empty list of devices"),
        (Q4, {"device": {"model.layer.0": "cpu"}}, ConfigError, "model.layer.0"),
        (Q4, {"skip": ("*",)}, ConfigError, "no layer to quantise.*skipped by"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(
    config: Any, options: dict[str, Any], error: type[HQQError], message: str, rng: torch.Generator
) -> None:
    model, _ = build("llama", rng)
    same = unchanged(model)
    with pytest.raises(error, match=message):
        quantize_model(model, config, **options)
    assert same()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_weight_is_named_before_anything_changes(value: float, rng: torch.Generator) -> None:
    model, _ = build("llama", rng)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    same = unchanged(model)
    with pytest.raises(WeightError, match=r"model.layers.1.mlp.up_proj: .*NaN or infinity"):
        quantize_model(model, Q4)
    assert same()


def test_weights_that_are_not_there(rng: torch.Generator) -> None:
    with pytest.raises(WeightError, match="0: .*meta device"):
        quantize_model(nn.Sequential(nn.Linear(8, 8, device="meta")), Q4)
    with pytest.raises(ShapeError, match="0: .*empty"), pytest.warns(UserWarning, match="zero-element"):
        quantize_model(nn.Sequential(nn.Linear(0, 8)), Q4)


def test_a_bare_layer_and_a_quantised_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="bare nn.Linear"):
        quantize_model(nn.Linear(32, 32), Q4)
    model = nn.Sequential(nn.Linear(32, 32))
    quantize_model(model, Q4)
    with pytest.raises(ConfigError, match="already quantised"):
        quantize_model(model, Q4)


def test_one_layer_under_two_names_cannot_have_two_configs() -> None:
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": shared, "b": shared})
    with pytest.raises(ConfigError, match="different configs for a, b"):
        quantize_model(model, {"a": Q4, "b": Q3})
