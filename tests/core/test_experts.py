"""HQQExperts is a stack of HQQLinear layers: codes, values, state and errors."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from hqq.core.config import BaseQuantizeConfig
from hqq.core.experts import ExpertWeight, HQQExperts, expert_parameters, experts_as_modules
from hqq.core.linear import HQQLinear
from hqq.errors import HQQError, MissingKeysError, ShapeError

E, N, K = 5, 24, 64
SETTINGS = [
    {
        "nbits": nbits,
        "axis": axis,
        "group_size": group_size,
        "quant_zero": quantised,
        "quant_scale": quantised,
    }
    for nbits, group_size in ((8, 64), (4, 16), (3, 64), (3, None), (2, 32), (1.58, 64), (1, 16))
    for axis in (0, 1)
    for quantised in (False, True)
]


class Experts(nn.Module):
    """What a mixture-of-experts model has, with parameters that are none of its experts' matrices."""

    def __init__(self, rng: torch.Generator) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(E, N, K, generator=rng))
        self.down_proj = nn.Parameter(torch.randn(E, K, N, generator=rng))
        self.down_proj_bias = nn.Parameter(torch.zeros(E, K))
        self.conv = nn.Conv1d(4, 4, 3)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_each_expert_is_the_layer_of_its_matrix(settings: dict[str, Any], rng: torch.Generator) -> None:
    config = BaseQuantizeConfig(**settings)
    W = torch.randn(E, N, K, generator=rng)
    experts = HQQExperts.from_weights(W, config, torch.bfloat16)
    layers = [HQQLinear.from_weights(matrix, None, config, torch.bfloat16) for matrix in W]
    expected = torch.stack([layer.dequantize() for layer in layers])
    for index, layer in enumerate(layers):
        assert torch.equal(experts.expert(index).W_q, layer.W_q)
        assert torch.equal(experts[index], expected[index])
    assert torch.equal(experts.dequantize(), expected)
    assert torch.equal(experts[torch.tensor(3)], expected[3])
    assert torch.equal(experts[-1], expected[-1])
    assert torch.equal(experts[1:4], expected[1:4])
    ids = torch.tensor([[1, 4, 1], [0, 0, 2]])
    assert torch.equal(experts[ids], expected[ids])
    assert torch.equal(experts[torch.tensor([], dtype=torch.int64)], expected[:0])
    assert torch.equal(experts[1, :, 2], expected[1, :, 2])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("encoded", [False, True])
def test_state_is_that_of_one_layer_with_the_experts_in_front(
    settings: dict[str, Any], encoded: bool, rng: torch.Generator
) -> None:
    config = BaseQuantizeConfig(**settings)
    W = torch.randn(E, N, K, generator=rng)
    experts = HQQExperts.from_weights(W, config, torch.float16)
    experts.encoded_state_dict = encoded
    layer = HQQLinear.from_weights(W[2], None, config, torch.float16)
    layer.encoded_state_dict = encoded
    state, one = experts.state_dict(), layer.state_dict()
    assert set(state) == set(one)
    assert tuple(state["shape"]) == (E, N, K)
    assert torch.equal(state["W_q"][2], one["W_q"])
    for read in (HQQExperts(compute_dtype=torch.float16), HQQExperts((E, N, K), torch.float16)):
        read.load_state_dict(state)
        assert torch.equal(read.dequantize(), experts.dequantize())
        assert read.quant_config is not None and experts.quant_config is not None
        assert read.quant_config["weight_quant_params"] == experts.quant_config["weight_quant_params"]


def test_moves_casts_copies_and_pickles_with_its_owner(rng: torch.Generator) -> None:
    owner = nn.Module()
    owner.gate = HQQExperts.from_weights(
        torch.randn(E, N, K, generator=rng), BaseQuantizeConfig(), torch.float32
    )
    expected = owner.gate.dequantize()
    other = copy.deepcopy(owner)
    file = io.BytesIO()
    torch.save(other, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    assert torch.equal(read.gate.dequantize(), expected)
    assert owner.to(torch.bfloat16).gate.dtype == torch.bfloat16
    assert torch.equal(other.gate.dequantize(), expected)
    empty = nn.Module()
    empty.gate = HQQExperts((E, N, K), torch.float32)
    empty.load_state_dict(other.state_dict())
    assert torch.equal(empty.gate.dequantize(), expected)


def test_torch_functions_take_it_for_its_weights(rng: torch.Generator) -> None:
    experts = HQQExperts.from_weights(
        torch.randn(E, N, K, generator=rng), BaseQuantizeConfig(), torch.float32
    )
    W = experts.dequantize()
    x = torch.randn(E, 3, K, generator=rng)
    assert torch.equal(torch.bmm(x, experts.transpose(-2, -1)), torch.bmm(x, W.transpose(-2, -1)))
    y = torch.randn(E, 3, N, generator=rng)
    assert torch.equal(torch.bmm(y, experts), torch.bmm(y, W))
    assert (experts.shape, experts.size(1), experts.ndim, len(experts)) == (W.shape, N, 3, E)


def test_parameters_of_experts_are_found_held_and_released(rng: torch.Generator) -> None:
    model = nn.Module()
    model.experts = Experts(rng)
    model.other = nn.Module()
    model.other.weight = nn.Parameter(torch.randn(2, 2, 2))
    assert [name for name, _, _ in expert_parameters(model)] == ["experts.gate_up_proj", "experts.down_proj"]
    before = dict(model.named_parameters())
    with experts_as_modules(model, {"experts.down_proj"}):
        assert isinstance(model.experts.down_proj, ExpertWeight)
        assert model.experts.gate_up_proj is before["experts.gate_up_proj"]
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: id(p) for name, p in before.items()
    }


@pytest.mark.parametrize("shape", [(N, K), (0, N, K), (2, 2, 2, 2)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="three dimensions"):
        HQQExperts.from_weights(torch.zeros(shape), BaseQuantizeConfig())


def test_states_that_do_not_fit_are_refused(rng: torch.Generator) -> None:
    experts = HQQExperts.from_weights(torch.randn(E, N, K, generator=rng), BaseQuantizeConfig())
    state = experts.state_dict()
    with pytest.raises(MissingKeysError, match="scale"):
        HQQExperts().load_state_dict({key: value for key, value in state.items() if key != "scale"})
    with pytest.raises(ShapeError, match=rf"\({E}, {N}, {K}\)"):
        HQQExperts((E + 1, N, K)).load_state_dict(state)
    with pytest.raises(ShapeError, match=f"{E} experts"):
        HQQExperts().load_state_dict({**state, "W_q": state["W_q"][:-1]})
    with pytest.raises(HQQError, match="shape"):
        HQQExperts().load_state_dict({**state, "W_q": state["W_q"][:, :-1]})
    with pytest.raises(HQQError, match="without weights"):
        _ = HQQExperts()[0]
