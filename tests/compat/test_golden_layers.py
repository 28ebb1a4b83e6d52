"""The 34 layers written by hqq 0.2.8: quantised again to the same bytes, loaded to the same bits, written the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hqq.core.linear import HQQLinear
from tests import oracle
from tests.compat import golden
from tests.core.layers import same_state, same_value

ENTRIES = golden.entries()
each_layer = pytest.mark.parametrize("entry", ENTRIES, ids=golden.entry_id)


def quantise_again(entry: dict[str, Any]) -> HQQLinear:
    name = entry["name"]
    W = golden.tensors()[f"{name}@input"]
    linear = nn.Linear(W.shape[1], W.shape[0], bias=entry["bias"])
    linear.weight.data = W.clone()
    if entry["bias"]:
        linear.bias.data = golden.tensors()[f"{name}.bias"].float()
    weight_params = {
        key: entry[key] for key in ("nbits", "group_size", "axis", "optimize", "round_zero", "view_as_float")
    }
    config = {"weight_quant_params": {**weight_params, "channel_wise": True, "solver": "hqq"}}
    return HQQLinear(linear, config, compute_dtype=golden.compute_dtype(entry), device="cpu")


def test_all_are_there() -> None:
    assert len(ENTRIES) == 34
    assert {entry["nbits"] for entry in ENTRIES} == {8, 6, 5, 4, 3, 2, 1.58, 1}
    assert {entry["axis"] for entry in ENTRIES} == {0, 1}


@each_layer
def test_quantising_gives_the_same_bytes(entry: dict[str, Any]) -> None:
    layer = quantise_again(entry)
    expected = golden.encoded_state(entry["name"])
    for key in ("W_q", "scale", "zero"):
        assert same_value(layer.state_dict()[key], expected[key]), key
    assert torch.equal(layer.unpack(dtype=torch.uint8), golden.tensors()[f"{entry['name']}@codes"])
    assert same_value(layer.dequantize(), golden.tensors()[f"{entry['name']}@dequantized"])


@each_layer
def test_the_encoded_state_is_the_same_key_by_key(entry: dict[str, Any]) -> None:
    expected = golden.encoded_state(entry["name"])
    state = dict(quantise_again(entry).state_dict())
    assert state.keys() == expected.keys()
    differing = [key for key in expected if not same_value(state[key], expected[key])]
    assert differing == []


@each_layer
def test_the_raw_state_is_the_same_key_by_key(entry: dict[str, Any]) -> None:
    expected = golden.raw_states()[entry["name"]]
    layer = quantise_again(entry)
    layer.encoded_state_dict = False
    state = dict(layer.state_dict())
    assert state.keys() == expected.keys()
    differing = [key for key in expected if not same_value(state[key], expected[key])]
    assert differing == []


@pytest.mark.parametrize("form", ["encoded", "raw"])
@each_layer
def test_loading_gives_the_same_bits(entry: dict[str, Any], form: str) -> None:
    name = entry["name"]
    state = golden.encoded_state(name) if form == "encoded" else golden.raw_states()[name]
    layer = HQQLinear(None, None, compute_dtype=golden.compute_dtype(entry), device="cpu")
    layer.load_state_dict(state)
    assert torch.equal(layer.unpack(dtype=torch.uint8), golden.tensors()[f"{name}@codes"])
    assert same_value(layer.dequantize(), golden.tensors()[f"{name}@dequantized"])
    layer.encoded_state_dict = form == "encoded"
    assert same_state(dict(layer.state_dict()), dict(state))


@each_layer
def test_the_oracle_agrees_with_the_original(entry: dict[str, Any]) -> None:
    """The oracle is checked against the original too, or the tests that rest on it would prove little."""
    state = golden.encoded_state(entry["name"])
    packing = bytes(state["packing"].tolist()).decode()
    dtype = golden.compute_dtype(entry)
    shape = (entry["shape"][0], entry["shape"][1])
    codes = golden.tensors()[f"{entry['name']}@codes"]
    W_q = state["W_q"].view(torch.int32 if packing == "3bit_32" else torch.uint8)
    assert oracle.pack(codes.tolist(), packing).tobytes() == W_q.numpy().tobytes()
    dequantised = oracle.dequantize(
        W_q.numpy(),
        state["scale"].flatten().tolist(),
        state["zero"].flatten().tolist(),
        packing,
        shape,
        entry["group_size"],
        entry["axis"],
        dtype,
    )
    assert torch.equal(dequantised, golden.tensors()[f"{entry['name']}@dequantized"])
