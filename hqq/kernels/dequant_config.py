"""Tile sizes of the dequantisation kernel: the type, the shipped choice, and the candidates that tuning tries."""

from __future__ import annotations

from typing import NamedTuple

from hqq.errors import ConfigError
from hqq.kernels.dequant_view import MatrixView

_STORE_BYTES = 16  # the widest store of one thread
_WARP = 32
_LARGEST_BLOCK = 1 << 16


class Config(NamedTuple):
    """`block` packed elements in a tile (a power of two), worked on by `warps` warps, `steps` tiles per program."""

    block: int
    warps: int
    steps: int


def check_config(config: Config) -> Config:
    """Return `config`, or raise ConfigError if no kernel can be built from it."""
    for name, value, largest in zip(config._fields, config, (_LARGEST_BLOCK, 32, 1 << 16), strict=True):
        power_needed = name != "steps"
        if not 1 <= value <= largest or (power_needed and value & (value - 1)):
            kind = "a power of two" if power_needed else "an integer"
            raise ConfigError(
                f"got {name}={value} for the dequantisation kernel; expected {kind} from 1 to {largest}"
            )
    return config


def full_width(out_itemsize: int, warps: int) -> int:
    """Return the tile size at which every thread stores exactly 16 bytes for each field.

    Larger tiles make Triton move results between threads before it stores them.
    """
    return _STORE_BYTES // out_itemsize * _WARP * warps


def config_of_block(block_size: int, out_itemsize: int) -> Config:
    """Return the configuration with tiles of `block_size` packed elements; raises ConfigError for an unusable size."""
    warps = max(1, min(8, block_size // full_width(out_itemsize, 1)))
    return check_config(Config(block_size, 1 << (warps.bit_length() - 1), 1))


def default_config(view: MatrixView, out_itemsize: int) -> Config:
    """Return the shipped choice.

    Groups that are columns reuse scale and zero down a column, so a program takes several tiles there.
    """
    warps = 4
    block = full_width(out_itemsize, warps)
    steps = 1
    if view.groups == "columns":
        tile_rows = max(1, block // max(view.columns, 1))
        steps = max(1, min(4, view.packed_rows // tile_rows))
    return Config(block, warps, steps)


def candidates(view: MatrixView, out_itemsize: int) -> list[Config]:
    """Return the configurations that tuning measures, the shipped choice first."""
    steps = (1, 2, 4, 8, 16) if view.groups == "columns" else (1, 2, 4)
    tried = [
        Config(full_width(out_itemsize, w), w, s) for w in (2, 4, 8) for s in steps if s <= view.packed_rows
    ]
    first = default_config(view, out_itemsize)
    return [first, *(c for c in tried if c != first)]
