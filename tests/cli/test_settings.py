"""From options to configurations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hqq import BaseQuantizeConfig, QuantConfig
from hqq.cli.parser import build_parser
from hqq.cli.settings import config_of
from hqq.errors import ConfigError


def config(*options: str) -> object:
    return config_of(build_parser().parse_args(["quantize", "model", "out", *options]))


def test_options_are_the_configuration() -> None:
    assert config() == QuantConfig(nbits=4, group_size=64, axis=1)
    options = ["--nbits", "1.58", "--group-size", "none", "--axis", "0", "--solver", "minmax"]
    assert config(*options) == QuantConfig(nbits=1.58, group_size=None, axis=0, solver="minmax")


def test_json_per_layer_takes_the_rest_from_the_options(tmp_path: Path) -> None:
    per_layer = {
        "self_attn.*": {"nbits": 3},
        "mlp.up_proj": BaseQuantizeConfig(nbits=2, group_size=16, axis=0),
        "lm_head": None,
    }
    expected = {
        "self_attn.*": QuantConfig(nbits=3, group_size=32, axis=1),
        "mlp.up_proj": QuantConfig.from_dict(BaseQuantizeConfig(nbits=2, group_size=16, axis=0)),
        "lm_head": None,
    }
    assert config("--group-size", "32", "--config", json.dumps(per_layer)) == expected
    file = tmp_path / "layers.json"
    file.write_text(json.dumps(per_layer), encoding="utf-8")
    assert config("--group-size", "32", "--config", str(file)) == expected


def test_json_for_all_layers() -> None:
    assert config("--config", '{"nbits": 2, "solver": null}') == QuantConfig(nbits=2, group_size=64)
    nested = BaseQuantizeConfig(nbits=3, group_size=32, axis=0, quant_zero=True)
    assert config("--nbits", "8", "--config", json.dumps(nested)) == QuantConfig.from_dict(nested)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("{}", "expected a JSON object"),
        ('{"mlp.up_proj": 4}', "got the settings 4"),
        ('{"mlp.up_proj": {"bits": 4}}', '"bits": 4'),
        ('{"nbits": 7}', "nbits=7"),
        ('{"weight_quant_params": {"nbits": 4}}', "group_size"),
    ],
)
def test_json_that_is_no_configuration_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config("--config", text)


def test_a_missing_file_is_an_os_error() -> None:
    with pytest.raises(FileNotFoundError):
        config("--config", "no-such-file.json")
