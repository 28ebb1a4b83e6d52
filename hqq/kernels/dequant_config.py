"""Tile sizes of the dequantisation kernel: the type, the shipped choice, and the candidates that tuning tries."""

from __future__ import annotations

from typing import NamedTuple

from hqq.errors import ConfigError
from hqq.kernels.dequant_view import MatrixView

_STORE_BYTES = 16  # the widest store of one thread
_WARP = 32
_LARGEST_BLOCK = 1 << 16
_MOST_STEPS = 32  # a program's tiles are written out one by one in its machine code
_LARGEST = 1 << 20


class Config(NamedTuple):
    """How the work is cut up and fed; numbers only, so that tuning can keep them. No result depends on it.

    A tile has `block` packed elements (a power of two), worked on by `warps` warps; a program takes `steps` tiles.
    `stripe`: groups that are columns are taken in stripes as wide as so many tiles; 0 takes whole rows.
    `burst`, `distance`: every burst-th program asks the L2 cache for the inputs of the `burst` programs that are
    `distance` further on; 0 leaves it to each program to load its own.
    `streaming`: 1 marks codes and results as not to be kept in the L2 cache, and scales and zeros of columns as to be
    kept.
    `overlap`: programs start before the previous kernel on the stream ends, and wait for that before they read or
    write; 1 lets the next kernel do so from the start, 2 once this one's inputs are asked for; 3 is like 2, and asks
    the L2 cache for its inputs before it waits.
    `phase`: the programs that ask are not every burst-th one, but the first of every `phase` programs, as many as
    need to (a multiple of `burst`), so that the memory reads for a while and then writes for a while; 0 spreads them.
    `resident`: so many programs at most share a multiprocessor, so that what is written at a time lies close together;
    0 lets as many in as fit.
    """

    block: int
    warps: int
    steps: int
    stripe: int = 0
    burst: int = 0
    distance: int = 0
    streaming: int = 0
    overlap: int = 1
    phase: int = 0
    resident: int = 0


_LIMITS = Config(_LARGEST_BLOCK, 32, _MOST_STEPS, _LARGEST, 1024, _LARGEST, 1, 3, _LARGEST, 32)
# Programs are kept out by the shared memory that the others reserve. One can have 48 KiB of 228, and needs some itself.
_LEAST_RESIDENT = 5


def check_config(config: Config) -> Config:
    """Return `config`, or raise ConfigError if no kernel can be built from it."""
    for name, value, largest in zip(config._fields, config, _LIMITS, strict=True):
        power_needed = name in ("block", "warps")
        least = 1 if power_needed or name == "steps" else 0
        if not least <= value <= largest or (power_needed and value & (value - 1)):
            kind = "a power of two" if power_needed else "an integer"
            raise ConfigError(
                f"got {name}={value} for the dequantisation kernel; expected {kind} from {least} to {largest}"
            )
    if 0 < config.resident < _LEAST_RESIDENT:
        raise ConfigError(
            f"got resident={config.resident} for the dequantisation kernel; expected 0 or {_LEAST_RESIDENT} at least"
        )
    if config.burst and config.phase % config.burst:
        raise ConfigError(
            f"got phase={config.phase} with burst={config.burst}; expected a multiple of burst, or 0"
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


# Results that no L2 cache of today holds: only there is it the memory that has to be kept busy.
_LARGE_BYTES = 64 << 20

# The shipped choices, measured on an H200 (see docs/kernels.md), by kind of groups and codes per packed element, with
# `block` for 16-bit results and `stripe` for 16-bit scales and zeros.
_LARGE = {
    ("rows", 1): Config(2048, 8, 1, 0, 8, 1024, 1),
    ("rows", 2): Config(1024, 4, 1, 0, 8, 2048, 1),
    ("rows", 4): Config(2048, 8, 1, 0, 4, 1024, 1, phase=1024),
    ("rows", 8): Config(2048, 8, 1, 0, 4, 1024, 1, phase=1024),
    ("rows", 10): Config(1024, 4, 1, 0, 4, 1024, 1),
    ("columns", 1): Config(1024, 4, 2, 1792, streaming=1),
    ("columns", 2): Config(1024, 4, 1, 1792, streaming=1),
    ("columns", 4): Config(1024, 4, 1, 1792, 16, 1024, 1, resident=8),
    ("columns", 8): Config(2048, 8, 1, 896, 8, 896, 1, phase=896),
    ("columns", 10): Config(1024, 4, 1, 1792, streaming=1),
}
_SMALL = {
    ("rows", 1): Config(2048, 4, 2, overlap=3),
    ("rows", 2): Config(2048, 4, 2, overlap=3),
    ("rows", 4): Config(1024, 2, 1, overlap=3),
    ("rows", 8): Config(2048, 4, 1, overlap=2),
    ("rows", 10): Config(1024, 4, 1, overlap=3),
    ("columns", 1): Config(1024, 4, 3, overlap=3),
    ("columns", 2): Config(1024, 4, 3, overlap=3),
    ("columns", 4): Config(2048, 8, 2, overlap=3),
    ("columns", 8): Config(2048, 8, 2, overlap=2),
    ("columns", 10): Config(1024, 4, 1, overlap=3),
}


def default_config(view: MatrixView, fields: int, out_itemsize: int, stat_bytes: int = 4) -> Config:
    """Return the shipped choice for `view`, whose packed elements hold `fields` codes each.

    stat_bytes: bytes of one group's scale and zero together. Stripes are as wide as the L2 cache can keep those of.
    """
    kind = "columns" if view.groups == "columns" else "rows"
    large = view.rows * view.columns * out_itemsize >= _LARGE_BYTES
    config = (_LARGE if large else _SMALL)[kind, fields]
    block = config.block * 2 // out_itemsize
    steps = config.steps
    if kind == "columns":
        tile_rows = max(1, block // view.columns)
        steps = max(1, min(steps, view.packed_rows // tile_rows))
    stripe = config.stripe * config.block // block * 4 // stat_bytes
    return config._replace(block=block, steps=steps, stripe=stripe)


def candidates(view: MatrixView, fields: int, out_itemsize: int, stat_bytes: int = 4) -> list[Config]:
    """Return the configurations that tuning measures, the shipped choice first; see `default_config`."""
    first = default_config(view, fields, out_itemsize, stat_bytes)
    columns = view.groups == "columns"
    tiles = [(full_width(out_itemsize, w), w) for w in (2, 4, 8)] + [(full_width(out_itemsize, 8), 4)]
    steps = [s for s in ((1, 2, 4, 8) if columns else (1, 2)) if s <= view.packed_rows]
    tried = [first._replace(block=block, warps=warps, steps=s) for block, warps in tiles for s in steps]
    tried += [first._replace(overlap=overlap) for overlap in (1, 2, 3)]
    if first.burst:
        tried += [first._replace(burst=burst, distance=d) for burst in (0, 8) for d in (1024, 2048)]
        tried += [first._replace(stripe=stripe) for stripe in (0, 896, 3584) if columns]
    return list(dict.fromkeys([first, *tried]))
