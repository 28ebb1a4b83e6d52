"""The 32 layers written by hqq 0.1.7: nested meta, quantised zeros and scales. They load, run, and re-save."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch.nn import functional as F

from hqq.core.linear import HQQLinear
from tests.compat import golden
from tests.core.layers import same_state, same_value

NAMES = sorted(golden.old_layers())
each_layer = pytest.mark.parametrize("name", NAMES)


def loaded(name: str) -> tuple[HQQLinear, dict[str, Any]]:
    old = golden.old_layers()[name]
    layer = HQQLinear(None, None, compute_dtype=torch.float16, device="cpu")
    layer.load_state_dict(old["state"])
    return layer, old


def test_all_are_there() -> None:
    assert len(NAMES) == 32


@each_layer
def test_dequantises_to_the_same_bits(name: str) -> None:
    layer, old = loaded(name)
    assert same_value(layer.dequantize(), old["dequantized"])


@each_layer
def test_runs(name: str, rng: torch.Generator) -> None:
    layer, old = loaded(name)
    x = torch.randn(3, layer.in_features, generator=rng).half()
    assert torch.equal(layer(x), F.linear(x, old["dequantized"], old["state"]["bias"]))


@each_layer
def test_loading_does_not_change_the_state(name: str) -> None:
    state = golden.old_layers()[name]["state"]
    before = copy.deepcopy(state)
    loaded(name)
    assert same_state(state, before)


@each_layer
def test_meta_reads_as_it_did(name: str) -> None:
    layer, old = loaded(name)
    expected, meta = old["state"]["meta"], layer.meta.copy()
    assert {key for key, value in expected.items() if value is not None} <= set(meta)
    for key, value in expected.items():
        if value is not None:
            assert same_value(meta[key], value), key


@pytest.mark.parametrize("form", ["safetensors", "torch.save"])
@each_layer
def test_saves_in_todays_formats(name: str, form: str) -> None:
    layer, old = loaded(name)
    if form == "safetensors":
        state = load(save(dict(layer.state_dict())))
    else:
        layer.encoded_state_dict = False
        file = io.BytesIO()
        torch.save(dict(layer.state_dict()), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    again = HQQLinear(None, None, compute_dtype=torch.float16, device="cpu")
    again.load_state_dict(state)
    assert same_value(again.dequantize(), old["dequantized"])
    again.encoded_state_dict = layer.encoded_state_dict
    assert same_state(dict(again.state_dict()), dict(layer.state_dict()))
