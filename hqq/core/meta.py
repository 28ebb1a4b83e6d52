"""The `meta` dict: how the original and its ecosystem describe a quantised tensor, and the way to and from QTensor.

Keys: nbits, group_size, shape, axis, packing, unpack_view_dtype, view_as_float, compute_dtype, quant_scale,
quant_zero; scale and zero, or, where those are quantised, scale_q with meta_scale and zero_q with meta_zero (dicts of
the same kind); old offloaded layers stack zero and scale in one tensor zero_scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hqq.core.bitpack import FORMAT_OF_BITS, FORMATS
from hqq.core.qtensor import QSpec, QTensor
from hqq.errors import MissingKeysError

Stat: TypeAlias = Tensor | QTensor


def spec_from_meta(meta: Mapping[str, Any]) -> QSpec:
    """Return the description in `meta`; raises MissingKeysError or ConfigError if it is not complete and valid."""
    missing = [key for key in ("nbits", "group_size", "shape", "axis") if key not in meta]
    if missing:
        raise MissingKeysError(
            f"got a quantised tensor's meta without {', '.join(missing)}; keys: {sorted(meta)}"
        )
    nbits = meta["nbits"]
    scale = meta.get("scale")
    return QSpec(
        nbits=nbits,
        shape=tuple(meta["shape"]),
        group_size=meta["group_size"],
        axis=meta["axis"],
        packing=meta["packing"] if "packing" in meta else FORMAT_OF_BITS.get(nbits),
        view_as_float=bool(meta.get("view_as_float", False)),
        # Only a tensor-wide scale is 0-d: that is how the original stores channel_wise=False.
        channel_wise=not (isinstance(scale, Tensor) and scale.ndim == 0),
    )


def stat_from_meta(meta: Mapping[str, Any], name: str) -> Stat:
    """Return scale or zero (`name`) of `meta`, quantised or not; raises MissingKeysError if there is none."""
    nested = meta.get(f"meta_{name}")
    stacked = meta.get("zero_scale")
    part = None if stacked is None else stacked[0 if name == "zero" else 1]
    if nested is None:
        tensor: Tensor | None = meta.get(name, part)
        if tensor is None:
            raise MissingKeysError(f"got a quantised tensor's meta without {name}; keys: {sorted(meta)}")
        return tensor
    codes = meta.get(f"{name}_q", part)
    if codes is None:
        raise MissingKeysError(f"got a quantised tensor's meta with meta_{name} but without {name}_q")
    return QTensor(
        codes, stat_from_meta(nested, "scale"), stat_from_meta(nested, "zero"), spec_from_meta(nested)
    )


def qtensor_from_meta(W_q: Tensor, meta: Mapping[str, Any], check: bool = True) -> QTensor:
    """Return the QTensor of packed codes and their meta; `check` shapes and dtypes."""
    q = QTensor(W_q, stat_from_meta(meta, "scale"), stat_from_meta(meta, "zero"), spec_from_meta(meta))
    return q.check() if check else q


def meta_of(q: QTensor, compute_dtype: torch.dtype, nested: bool = False) -> dict[str, Any]:
    """Return the meta dict of `q`; `nested` leaves out the keys that only a layer's meta has."""
    spec = q.spec
    meta: dict[str, Any] = {
        "nbits": spec.nbits,
        "group_size": spec.group_size,
        "shape": torch.Size(spec.shape),
    }
    for name, stat in (("scale", q.scale), ("zero", q.zero)):
        if isinstance(stat, QTensor):
            meta[f"{name}_q"] = stat.W_q
            meta[f"meta_{name}"] = meta_of(stat, compute_dtype, nested=True)
        else:
            meta[name] = stat
    meta["axis"] = spec.axis
    meta["packing"] = spec.packing
    fmt = FORMATS[spec.packing or FORMAT_OF_BITS[spec.nbits]]
    meta["unpack_view_dtype"] = fmt.dtype
    meta["view_as_float"] = spec.view_as_float
    if not nested:
        meta["quant_scale"] = isinstance(q.scale, QTensor)
        meta["quant_zero"] = isinstance(q.zero, QTensor)
    meta["compute_dtype"] = compute_dtype
    return meta
