"""Which configuration each layer gets: one for all, or one per name, tag or glob."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hqq.core.config import QuantConfig, is_config_dict
from hqq.core.modules import linear_tag, matches
from hqq.errors import ConfigError

LayerConfig = QuantConfig | Mapping[str, Any] | None
ModelConfig = QuantConfig | Mapping[str, Any]


class Choice(NamedTuple):
    """The configuration of a layer (None: leave it), and whether its name or tag was given word for word."""

    config: QuantConfig | None
    explicit: bool = False


class ConfigChooser:
    """Chooses each layer's configuration.

    Args:
        config: a QuantConfig or nested dict for all layers, or {pattern: QuantConfig, nested dict or None}. A pattern
            is a layer's name, its tag ("self_attn.q_proj") or a glob; a name wins over a tag, a tag over a glob, an
            earlier glob over a later one. A layer that no pattern fits is not quantised.

    Raises ConfigError for what is neither.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._single: QuantConfig | None = None
        self._by_pattern: dict[str, QuantConfig | None] = {}
        if isinstance(config, QuantConfig) or is_config_dict(config):
            self._single = _typed("config", config)
            return
        if not isinstance(config, Mapping) or not config:
            raise ConfigError(
                f"got config={config!r}; expected QuantConfig(...), BaseQuantizeConfig(...), or a dict of those by "
                "layer name, tag or glob"
            )
        self._by_pattern = {str(key): _typed(str(key), value) for key, value in config.items()}

    def choose(self, names: Sequence[str]) -> Choice:
        """Return the choice for the layer registered under `names`; raises ConfigError if they disagree."""
        choices = {self._choose(name) for name in names}
        configs = {choice.config for choice in choices}
        if len(configs) > 1:
            raise ConfigError(
                f"got different configs for {', '.join(names)}, which are one and the same layer; name only one of them"
            )
        return Choice(configs.pop(), any(choice.explicit for choice in choices))

    def _choose(self, name: str) -> Choice:
        if not self._by_pattern:
            return Choice(self._single)
        for key in (name, linear_tag(name)):
            if key in self._by_pattern:
                return Choice(self._by_pattern[key], explicit=True)
        globs = (config for pattern, config in self._by_pattern.items() if matches(name, pattern))
        return Choice(next(globs, None))

    def check_all_used(self, names: Sequence[str]) -> None:
        """Raise ConfigError if a pattern fits none of the layers called `names`."""
        unused = [
            pattern for pattern in self._by_pattern if not any(matches(name, pattern) for name in names)
        ]
        if unused:
            tags = (
                ", ".join(dict.fromkeys(linear_tag(name) for name in names)) or "none: it has no linear layer"
            )
            raise ConfigError(
                f"got config patterns that fit no layer: {', '.join(map(repr, unused))}; "
                f"the model's layer tags are {tags}"
            )


def _typed(key: str, config: object) -> QuantConfig | None:
    if config is None or isinstance(config, QuantConfig):
        return config
    if isinstance(config, Mapping):
        try:
            return QuantConfig.from_dict(config)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from error
    raise ConfigError(f"{key}: got {config!r}; expected QuantConfig(...), BaseQuantizeConfig(...) or None")
