"""Layers that the original wrote: tests/fixtures/golden."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hqq.core.dtypes import dtype_from_name

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "golden"


def entries() -> list[dict[str, Any]]:
    """Return the settings of the 0.2.8 layers."""
    listed: list[dict[str, Any]] = json.loads((FOLDER / "index.json").read_text())
    return listed


def entry_id(entry: dict[str, Any]) -> str:
    """Return a readable name for a layer."""
    flags = [name for name in ("bias", "optimize", "round_zero", "view_as_float") if entry[name]]
    N, K = entry["shape"]
    dtype = entry["dtype"].removeprefix("torch.")
    return (
        f"{entry['nbits']}bit-axis{entry['axis']}-gs{entry['group_size']}-{N}x{K}-{dtype}-{'-'.join(flags)}"
    )


def compute_dtype(entry: dict[str, Any]) -> torch.dtype:
    """Return the compute dtype of a layer."""
    return dtype_from_name(entry["dtype"])


@cache
def tensors() -> dict[str, Tensor]:
    """Return everything in layers.safetensors: `name.key` for state, `name@input` and the like for expectations."""
    return load_file(FOLDER / "layers.safetensors")


@cache
def raw_states() -> dict[str, dict[str, Any]]:
    """Return the same layers as raw state dicts."""
    loaded: dict[str, dict[str, Any]] = torch.load(FOLDER / "layers.pt", weights_only=True)
    return loaded


def encoded_state(name: str) -> dict[str, Tensor]:
    """Return one layer's encoded state, without prefix."""
    return {
        key.removeprefix(f"{name}."): value for key, value in tensors().items() if key.startswith(f"{name}.")
    }


@cache
def old_layers() -> dict[str, dict[str, Any]]:
    """Return the 0.1.7 layers: state, input and dequantised weight of each."""
    loaded: dict[str, dict[str, Any]] = torch.load(FOLDER / "old_0.1.7.post3.pt", weights_only=True)
    return loaded
