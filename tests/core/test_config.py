"""The typed configuration, the nested dict, and the way between them."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from hqq.core.config import BaseQuantizeConfig, QuantConfig, complete_config, is_config_dict
from hqq.errors import ConfigError

CONFIGS = [
    QuantConfig(),
    QuantConfig(nbits=8, group_size=None, axis=0),
    QuantConfig(nbits=1.58, group_size=16, round_zero=True, optimize=False),
    QuantConfig(nbits=3, quant_zero=True),
    QuantConfig(nbits=2, quant_scale=True, view_as_float=True),
    QuantConfig(quant_zero=True, quant_scale=True, solver="minmax"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_there_and_back(config: QuantConfig) -> None:
    nested = config.to_dict()
    assert json.loads(json.dumps(nested)) == nested
    assert set(nested) == {"weight_quant_params", "scale_quant_params", "zero_quant_params", "offload_meta"}
    back = QuantConfig.from_dict(nested)
    assert back.to_dict() == nested
    assert back == (
        config
        if config.round_zero is not None
        else QuantConfig(**{**vars(config), "round_zero": config.nbits == 4})
    )


def test_the_nested_dict_is_the_originals() -> None:
    assert BaseQuantizeConfig(nbits=4, group_size=64, quant_zero=True, quant_scale=True, axis=0) == {
        "weight_quant_params": {
            "nbits": 4,
            "channel_wise": True,
            "group_size": 64,
            "optimize": True,
            "round_zero": True,
            "axis": 0,
            "view_as_float": False,
        },
        "scale_quant_params": {"nbits": 8, "channel_wise": True, "group_size": 128, "optimize": False},
        "zero_quant_params": {"nbits": 8, "channel_wise": False, "group_size": None, "optimize": False},
        "offload_meta": False,
    }


def test_arguments_by_position_are_in_the_originals_order() -> None:
    nested = BaseQuantizeConfig(2, 16, True, False, False, True, 0)
    assert nested["weight_quant_params"]["nbits"] == 2
    assert nested["weight_quant_params"]["group_size"] == 16
    assert nested["zero_quant_params"] is not None
    assert nested["scale_quant_params"] is None
    assert nested["weight_quant_params"]["view_as_float"] is True
    assert nested["weight_quant_params"]["axis"] == 0


def test_offloaded_scale_and_zero_are_quantised_alike() -> None:
    nested = BaseQuantizeConfig(quant_zero=True, offload_meta=True)
    assert nested["offload_meta"] is True
    assert nested["scale_quant_params"] == nested["zero_quant_params"]
    assert nested["zero_quant_params"]["group_size"] == 128


def test_dicts_of_older_versions_are_completed() -> None:
    old = {"weight_quant_params": {"nbits": 4, "group_size": 64}}
    before = copy.deepcopy(old)
    assert complete_config(old) == {
        "weight_quant_params": {
            "nbits": 4,
            "group_size": 64,
            "channel_wise": True,
            "optimize": True,
            "round_zero": False,
            "axis": 0,
            "view_as_float": False,
        },
        "scale_quant_params": None,
        "zero_quant_params": None,
        "offload_meta": False,
    }
    assert old == before


def test_completing_gives_a_copy() -> None:
    config = BaseQuantizeConfig(quant_zero=True)
    complete = complete_config(config)
    complete["weight_quant_params"]["nbits"] = 1
    complete["zero_quant_params"]["nbits"] = 1
    assert config["weight_quant_params"]["nbits"] == 4
    assert config["zero_quant_params"]["nbits"] == 8


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"nbits": 7}, "got nbits=7; expected one of 8, 6, 5, 4, 3, 2, 1.58, 1"),
        ({"nbits": True}, "got nbits=True"),
        ({"nbits": "4"}, "got nbits='4'"),
        ({"group_size": 0}, "got group_size=0; expected a positive integer, or None for whole channels"),
        ({"group_size": -64}, "got group_size=-64"),
        ({"group_size": 64.0}, "got group_size=64.0"),
        ({"group_size": True}, "got group_size=True"),
        ({"axis": 2}, "got axis=2; expected 0 or 1"),
        ({"axis": -1}, "got axis=-1"),
        ({"axis": True}, "got axis=True"),
        ({"axis": 1.0}, "got axis=1.0"),
        ({"solver": "magic"}, "got solver='magic'; expected one of"),
        ({"solver": 3}, "got solver=3"),
    ],
)
def test_bad_settings(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantConfig(**setting)
    with pytest.raises(ValueError, match=message):
        BaseQuantizeConfig(**setting)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "without 'weight_quant_params'"),
        ({"nbits": 4, "group_size": 64}, r"without 'weight_quant_params' \(keys: nbits, group_size\)"),
        (
            {"weight_quant_params": {"nbits": 4, "group_size": 64}, "extra": 1},
            r"got unknown config keys \['extra'\]",
        ),
        ({"weight_quant_params": {"nbits": 4}}, r"missing \['group_size'\]"),
        ({"weight_quant_params": {"nbits": 4, "group_size": 64, "bits": 3}}, r"unknown \['bits'\]"),
        ({"weight_quant_params": None}, "got weight_quant_params"),
        (
            {"weight_quant_params": {"nbits": 4, "group_size": 64}, "zero_quant_params": 8},
            "got zero_quant_params",
        ),
    ],
)
def test_dicts_that_are_no_configuration(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        complete_config(config)


@pytest.mark.parametrize("config", [None, 4, "4bit", [1]])
def test_other_types_are_no_configuration(config: object) -> None:
    assert not is_config_dict(config)
    with pytest.raises(ConfigError, match="expected what BaseQuantizeConfig"):
        complete_config(config)  # type: ignore[arg-type]


def test_a_dict_by_layer_tag_is_not_one_configuration() -> None:
    assert is_config_dict(BaseQuantizeConfig())
    assert not is_config_dict({"self_attn.q_proj": BaseQuantizeConfig()})
