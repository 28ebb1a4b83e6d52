"""Quantisation settings: a validated type, and the nested dict that checkpoints and other libraries use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hqq.core.bitpack import check_nbits
from hqq.core.hooks import before_config
from hqq.core.solvers import SOLVERS, ZERO_MODES
from hqq.errors import ConfigError

LegacyConfig = dict[str, Any]

# The keys of weight_quant_params, in the order that checkpoints have them.
WEIGHT_KEYS = ("nbits", "channel_wise", "group_size", "optimize", "round_zero", "axis", "view_as_float")
_SECTIONS = ("weight_quant_params", "scale_quant_params", "zero_quant_params")

SCALE_PARAMS: Mapping[str, Any] = {"nbits": 8, "channel_wise": True, "group_size": 128, "optimize": False}
ZERO_PARAMS: Mapping[str, Any] = {"nbits": 8, "channel_wise": False, "group_size": None, "optimize": False}


@dataclass(frozen=True)
class QuantConfig:
    """How to quantise a weight.

    Args:
        nbits: bits per weight: 8, 6, 5, 4, 3, 2, 1.58 or 1.
        group_size: weights per scale and zero; any divisor of the weight's number of elements, None for whole channels.
        axis: 1 groups neighbours along in_features, 0 strides over out_features.
        quant_zero: store zeros in 8 bit with one scale and zero for the whole tensor.
        quant_scale: store scales in 8 bit in groups of 128.
        offload_meta: recorded and honoured as a wish of old configurations: scale and zero are quantised alike.
        view_as_float: store packed codes under the compute dtype (for sharding that takes float tensors only).
        optimize: False rounds to nearest instead of running the solver.
        round_zero: start from integer zeros; None means the original's choice, 4 bit only.
        solver: name of the solver; None for the default.
        zero_mode: which zeros the default solver may choose: float, integer, middle or signed; None for float.

    Raises ConfigError for values outside these.
    """

    nbits: float = 4
    group_size: int | None = 64
    axis: int = 1
    quant_zero: bool = False
    quant_scale: bool = False
    offload_meta: bool = False
    view_as_float: bool = False
    optimize: bool = True
    round_zero: bool | None = None
    solver: str | None = None
    zero_mode: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbits", check_nbits(self.nbits))
        gs = self.group_size
        if gs is not None and (isinstance(gs, bool) or not isinstance(gs, int) or gs < 1):
            raise ConfigError(
                f"got group_size={gs!r}; expected a positive integer, or None for whole channels"
            )
        if isinstance(self.axis, bool) or not isinstance(self.axis, int) or self.axis not in (0, 1):
            raise ConfigError(f"got axis={self.axis!r}; expected 0 or 1")
        if self.solver is not None and self.solver not in SOLVERS:
            raise ConfigError(f"got solver={self.solver!r}; expected one of {', '.join(SOLVERS)}, or None")
        if self.zero_mode is not None and self.zero_mode not in ZERO_MODES:
            raise ConfigError(
                f"got zero_mode={self.zero_mode!r}; expected one of {', '.join(ZERO_MODES)}, or None"
            )

    def to_dict(self) -> LegacyConfig:
        """Return the nested dict form, JSON-able, as `BaseQuantizeConfig` gives it."""
        weight: dict[str, Any] = {
            "nbits": self.nbits,
            "channel_wise": True,
            "group_size": self.group_size,
            "optimize": self.optimize,
            "round_zero": self.nbits == 4 if self.round_zero is None else self.round_zero,
            "axis": self.axis,
            "view_as_float": self.view_as_float,
        }
        if self.solver is not None:
            weight["solver"] = self.solver
        if self.zero_mode is not None:
            weight["zero_mode"] = self.zero_mode
        quant_scale = self.quant_zero if self.offload_meta else self.quant_scale
        zero = SCALE_PARAMS if self.offload_meta else ZERO_PARAMS
        return {
            "weight_quant_params": weight,
            "scale_quant_params": dict(SCALE_PARAMS) if quant_scale else None,
            "zero_quant_params": dict(zero) if self.quant_zero else None,
            "offload_meta": self.offload_meta,
        }

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> QuantConfig:
        """Return the typed form of a nested dict, of today's or an older version's keys.

        Raises ConfigError for a dict that is not a quantisation configuration.
        """
        config = complete_config(config)
        weight = config["weight_quant_params"]
        return cls(
            nbits=weight["nbits"],
            group_size=weight["group_size"],
            axis=weight["axis"],
            quant_zero=bool(config["zero_quant_params"]),
            quant_scale=bool(config["scale_quant_params"]),
            offload_meta=bool(config["offload_meta"]),
            view_as_float=weight["view_as_float"],
            optimize=weight["optimize"],
            round_zero=weight["round_zero"],
            solver=weight.get("solver"),
            zero_mode=weight.get("zero_mode"),
        )


def is_config_dict(config: object) -> bool:
    """Whether `config` is one nested configuration (and not, say, a dict of them by layer tag)."""
    return isinstance(config, Mapping) and "weight_quant_params" in config


def complete_config(config: Mapping[str, Any]) -> LegacyConfig:
    """Return a copy of a nested dict with the keys that older versions lack; raises ConfigError if it is not one."""
    if not is_config_dict(config):
        found = f"keys: {', '.join(map(str, config))}" if isinstance(config, Mapping) else repr(config)
        raise ConfigError(
            f"got a quantisation config without 'weight_quant_params' ({found}); "
            "expected what BaseQuantizeConfig(nbits=..., group_size=...) returns"
        )
    unknown = set(config) - {*_SECTIONS, "offload_meta"}
    if unknown:
        raise ConfigError(
            f"got unknown config keys {sorted(unknown)}; expected {', '.join(_SECTIONS)}, offload_meta"
        )
    for section in _SECTIONS:
        if config.get(section) is not None and not isinstance(config[section], Mapping):
            raise ConfigError(f"got {section}={config[section]!r}; expected a dict")
    if config["weight_quant_params"] is None:
        raise ConfigError("got weight_quant_params=None; expected a dict with nbits and group_size")
    weight = {"channel_wise": True, "optimize": True, "round_zero": False, "axis": 0, "view_as_float": False}
    weight.update(config["weight_quant_params"])
    missing = [key for key in ("nbits", "group_size") if key not in weight]
    extra = set(weight) - {*WEIGHT_KEYS, "solver", "zero_mode"}
    if missing or extra:
        raise ConfigError(
            f"got weight_quant_params with missing {missing} and unknown {sorted(extra)}; "
            f"expected {', '.join(WEIGHT_KEYS)} and optionally solver and zero_mode"
        )
    complete: LegacyConfig = {"weight_quant_params": weight}
    for section in ("scale_quant_params", "zero_quant_params"):
        params = config.get(section)
        complete[section] = dict(params) if params else None
    complete["offload_meta"] = bool(config.get("offload_meta", False))
    return complete


def hqq_base_quant_config(
    nbits: float = 4,
    group_size: int | None = 64,
    quant_zero: bool = False,
    quant_scale: bool = False,
    offload_meta: bool = False,
    view_as_float: bool = False,
    axis: int = 1,
    solver: str | None = None,
) -> LegacyConfig:
    """Return a quantisation configuration as the nested dict that the ecosystem uses; see `QuantConfig`."""
    before_config()
    return QuantConfig(
        nbits=nbits,
        group_size=group_size,
        quant_zero=quant_zero,
        quant_scale=quant_scale,
        offload_meta=offload_meta,
        view_as_float=view_as_float,
        axis=axis,
        solver=solver,
    ).to_dict()


BaseQuantizeConfig = hqq_base_quant_config
