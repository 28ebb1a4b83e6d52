"""The wire format: how one layer's state is written into and read from a state dict.

Encoded, every value is a tensor, so that safetensors takes it: numbers as 0-d int32 (float32 for 1.58), booleans as
0-d uint8, shapes as int64, names and dtypes as uint8 ASCII codes, None by absence, nested meta by dotted keys.
Raw, values keep their Python types. `decode` reads both. Dtypes are looked up in a table, never evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hqq.core.dtypes import dtype_from_name
from hqq.errors import CorruptCheckpointError, HQQError

# The keys of a layer in hqq 0.2.x; bias is optional.
LAYER_KEYS: tuple[str, ...] = (
    "W_q",
    "nbits",
    "group_size",
    "shape",
    "scale",
    "zero",
    "axis",
    "packing",
    "unpack_view_dtype",
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "compute_dtype",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
)

# Keys of quantised or offloaded scale and zero; those with meta_ hold a nested meta, encoded under dotted keys.
QUANTIZED_STAT_KEYS: tuple[str, ...] = ("scale_q", "zero_q", "zero_scale")
NESTED_KEYS: tuple[str, ...] = ("meta_scale", "meta_zero")


def encode(value: Any) -> Tensor:
    """Return `value` (Tensor, bool, int, float, str, torch.dtype, torch.Size) as a tensor that safetensors takes."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, torch.dtype):
        value = str(value)
    if isinstance(value, bool):
        return torch.tensor(int(value), dtype=torch.uint8)
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int32)
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float32)
    if isinstance(value, str):
        return torch.tensor(list(value.encode("ascii")), dtype=torch.uint8)
    if isinstance(value, (tuple, list)):
        return torch.tensor(value, dtype=torch.int64)
    raise TypeError(
        f"got a value of type {type(value).__name__}; expected a tensor, number, string, dtype or shape"
    )


def encode_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return `state` with every value encoded, nested dicts under dotted keys, and None left out."""
    encoded: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            encoded.update({f"{key}.{inner}": item for inner, item in encode_state(value).items()})
        elif value is not None:
            encoded[key] = encode(value)
    return encoded


def decode_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a layer's `state` (without prefix) with Python types, nested again; raw values pass through.

    Raises CorruptCheckpointError for a value that cannot be what its key says, DtypeError for an unknown dtype name.
    """
    decoded: dict[str, Any] = {}
    for key, value in state.items():
        head, _, rest = key.partition(".")
        if rest and head in NESTED_KEYS:
            decoded.setdefault(head, {})[rest] = _decode_value(rest, value)
        elif isinstance(value, Mapping):
            decoded[key] = decode_state(value)
        else:
            decoded[key] = _decode_value(key, value)
    for nested in (decoded.get(name) for name in NESTED_KEYS):
        if isinstance(nested, dict):
            nested.setdefault("group_size", None)
    return decoded


def _decode_value(key: str, value: Any) -> Any:
    decoder = _DECODERS.get(key)
    if decoder is None or not isinstance(value, Tensor):
        return value
    try:
        return decoder(value)
    except HQQError:
        raise
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise CorruptCheckpointError(
            f"got {key} as a tensor of shape {tuple(value.shape)} and {value.dtype} that does not decode ({error})"
        ) from error


def _number(value: Tensor) -> int | float:
    number = value.item()
    # 1.58 goes through float32; every other bit width and size is a whole number.
    return int(number) if float(number).is_integer() else round(float(number), 2)


def _text(value: Tensor) -> str:
    return bytes(value.to(torch.uint8).flatten().tolist()).decode("ascii")


_DECODERS: dict[str, Callable[[Tensor], Any]] = {
    **dict.fromkeys(("nbits", "group_size", "axis"), _number),
    "shape": lambda value: torch.Size(value.flatten().tolist()),
    "packing": _text,
    **dict.fromkeys(("compute_dtype", "unpack_view_dtype"), lambda value: dtype_from_name(_text(value))),
    **dict.fromkeys(
        (
            "view_as_float",
            "quant_scale",
            "quant_zero",
            "offload_meta",
            "encoded_state_dict",
            "stores_quant_config",
            "channel_wise",
            "optimize",
            "round_zero",
        ),
        lambda value: bool(value.item()),
    ),
}
