"""The module walker: names, tags, patterns, skip rules."""

from __future__ import annotations

import pytest
from torch import nn

from hqq.core.linear import HQQLinear
from hqq.core.modules import (
    find_module,
    linear_tag,
    matches,
    named_leaves,
    named_sites,
    replace_module,
    skip_rule,
)
from hqq.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("model.layers.31.self_attn.k_proj", "self_attn.k_proj"),
        ("model.layers.3.block_sparse_moe.experts.5.w1", "block_sparse_moe.experts.w1"),
        ("encoder.layers.0.fc1", "encoder.fc1"),
        ("lm_head", "lm_head"),
        ("2", "2"),
        ("model.layers.4", "model.layers.4"),
    ],
)
def test_linear_tag(name: str, tag: str) -> None:
    assert linear_tag(name) == tag


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("model.layers.2.mlp.down_proj", True),
        ("mlp.down_proj", True),
        ("*.down_proj", True),
        ("model.layers.[0-3].*", True),
        ("model.layers.[3-9].*", False),
        ("down_proj", False),
        ("mlp.*", True),
    ],
)
def test_matches(pattern: str, fits: bool) -> None:
    assert matches("model.layers.2.mlp.down_proj", pattern) is fits


@pytest.mark.parametrize(
    ("rule", "applies"),
    [
        ("model.layers.10.mlp.down_proj", True),
        ("down_proj", True),
        ("down", True),
        ("10", True),
        ("1", False),
        ("*.mlp.*", True),
        ("lm_head", False),
        ("", False),
    ],
)
def test_skip_rule(rule: str, applies: bool) -> None:
    assert (skip_rule("model.layers.10.mlp.down_proj", ["unrelated", rule]) == rule) is applies


def test_a_module_with_two_names_is_one_site_and_is_replaced_at_both() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([nn.Linear(4, 4), shared])})
    assert named_sites(model)[shared] == ("a", "b.1")
    assert [name for name, _ in named_leaves(model)] == ["a", "b.0"]
    new = nn.Identity()
    replace_module(model, ("a", "b.1"), new)
    assert find_module(model, "a") is new
    assert find_module(model, "b.1") is new
    assert find_module(model, "b.2") is None


def test_a_quantised_layer_is_a_leaf() -> None:
    config = {
        "weight_quant_params": {"nbits": 8, "group_size": 64},
        "zero_quant_params": {"nbits": 8, "channel_wise": False, "group_size": None, "optimize": False},
    }
    model = nn.Sequential(HQQLinear(nn.Linear(64, 64), config, device="cpu"))
    assert [name for name, _ in named_leaves(model)] == ["0"]


@pytest.mark.parametrize("name", ["", "nothing", "0.weight"])
def test_replacing_what_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected the name of a module"):
        replace_module(nn.Sequential(nn.Linear(2, 2)), [name], nn.Identity())
