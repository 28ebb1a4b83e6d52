"""The names under which a quantised layer's state stands in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from hqq.core.wire import LAYER_KEYS, NESTED_KEYS, QUANTIZED_STAT_KEYS

# What may follow the name of a quantised layer; its bias is loaded like any other parameter.
STATE_KEYS: tuple[str, ...] = (
    *LAYER_KEYS,
    *QUANTIZED_STAT_KEYS,
    *(f"{nested}.{key}" for nested in NESTED_KEYS for key in LAYER_KEYS),
)
_STATE_KEYS = frozenset(STATE_KEYS)


def splits(key: str) -> Iterator[tuple[str, str]]:
    """Yield each (layer name, state key) that `key` may be made of, the longest state key first."""
    parts = key.split(".")
    for count in (2, 1):
        end = ".".join(parts[-count:])
        if len(parts) > count and end in _STATE_KEYS:
            yield ".".join(parts[:-count]), end
