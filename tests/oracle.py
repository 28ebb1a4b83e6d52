"""A second, slow implementation of the format, written from its description one element at a time.

It shares no code with hqq, works in float64 and uses no reshape or broadcast, so that a mistake in either shows. Tests
compare the library with it; nothing here is fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.generic]

# bits per field, fields per element, numpy dtype of an element
PACKINGS: dict[str, tuple[int, int, type[np.generic]]] = {
    "8bit_u8": (8, 1, np.uint8),
    "4bit_u8": (4, 2, np.uint8),
    "3bit_32": (3, 10, np.int32),
    "2bit_u8": (2, 4, np.uint8),
    "1bit_u8": (1, 8, np.uint8),
}
PACKING_OF_BITS = {
    8: "8bit_u8",
    6: "8bit_u8",
    5: "8bit_u8",
    4: "4bit_u8",
    3: "3bit_32",
    2: "2bit_u8",
    1.58: "2bit_u8",
    1: "1bit_u8",
}
LEVELS = {8: 256, 6: 64, 5: 32, 4: 16, 3: 8, 2: 4, 1.58: 3, 1: 2}


def pack(codes: Sequence[Sequence[int]], packing: str) -> Array:
    """Pack a matrix of codes: row r + i * P of P packed rows goes into field i, field 0 in the highest bits."""
    bits, fields, dtype = PACKINGS[packing]
    rows, columns = len(codes), len(codes[0])
    packed_rows = math.ceil(rows / fields)
    out = np.zeros((packed_rows, columns), dtype=np.int64)
    for row in range(rows):
        field, packed_row = divmod(row, packed_rows)
        for column in range(columns):
            out[packed_row, column] += int(codes[row][column]) * 2 ** (bits * (fields - 1 - field))
    return out.astype(dtype)


def unpack(packed: Array, packing: str, rows: int) -> list[list[int]]:
    """Return the codes of the first `rows` rows."""
    bits, fields, _ = PACKINGS[packing]
    packed_rows, columns = packed.shape
    assert rows <= packed_rows * fields
    codes = []
    for row in range(rows):
        field, packed_row = divmod(row, packed_rows)
        divisor = 2 ** (bits * (fields - 1 - field))
        codes.append([int(packed[packed_row, column]) // divisor % 2**bits for column in range(columns)])
    return codes


@dataclass(frozen=True)
class Place:
    """Where element (n, k) of a weight goes: cell of the grouped matrix, and number of its group."""

    row: int
    column: int
    group: int


def place(n: int, k: int, shape: tuple[int, int], group_size: int | None, axis: int) -> Place:
    """Return where W[n, k] lies; see the format: axis 1 groups neighbours, axis 0 strides of numel / group_size."""
    N, K = shape
    flat = n * K + k
    if axis == 1:
        gs = K if group_size is None else group_size
        return Place(flat // gs, flat % gs, flat // gs)
    gs = N if group_size is None else group_size
    groups = N * K // gs
    return Place(flat // groups, flat % groups, flat % groups)


def matrix_shape(shape: tuple[int, int], group_size: int | None, axis: int) -> tuple[int, int]:
    """Return the shape of the grouped matrix."""
    last = place(shape[0] - 1, shape[1] - 1, shape, group_size, axis)
    return last.row + 1, last.column + 1


def elements(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield every (n, k)."""
    for n in range(shape[0]):
        for k in range(shape[1]):
            yield n, k


def group(W: Array, group_size: int | None, axis: int) -> Array:
    """Return the grouped matrix of W [N, K]."""
    shape = (W.shape[0], W.shape[1])
    out = np.empty(matrix_shape(shape, group_size, axis), dtype=W.dtype)
    for n, k in elements(shape):
        cell = place(n, k, shape, group_size, axis)
        out[cell.row, cell.column] = W[n, k]
    return out


def groups_of(W: Array, group_size: int | None, axis: int) -> list[list[float]]:
    """Return the values of every group of W [N, K]."""
    shape = (W.shape[0], W.shape[1])
    values: dict[int, list[float]] = {}
    for n, k in elements(shape):
        values.setdefault(place(n, k, shape, group_size, axis).group, []).append(float(W[n, k]))
    return [values[index] for index in range(len(values))]


def dequantize(
    packed: Array,
    scale: Sequence[float],
    zero: Sequence[float],
    packing: str,
    shape: tuple[int, int],
    group_size: int | None,
    axis: int,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Return `(W_q - zero) * scale`, the difference and the product each rounded to `dtype`.

    scale, zero: one value for each group, exactly representable in `dtype`. The operations are done in float64,
    where both are exact for 16-bit formats and correctly rounded (to well below half a unit) for float32.
    """
    codes = unpack(packed, packing, matrix_shape(shape, group_size, axis)[0])
    out = torch.empty(shape, dtype=dtype)
    for n, k in elements(shape):
        cell = place(n, k, shape, group_size, axis)
        difference = rounded(codes[cell.row][cell.column] - zero[cell.group], dtype)
        out[n, k] = rounded(difference * scale[cell.group], dtype)
    return out


def rounded(value: float, dtype: torch.dtype) -> float:
    """Return `value` rounded to `dtype`."""
    return float(torch.tensor(value, dtype=torch.float64).to(dtype))


def min_max(values: Sequence[float], levels: int) -> tuple[float, float]:
    """Return (scale, zero) of the lattice whose code 0 is the least and whose code levels - 1 is the largest value."""
    low, high = min(values), max(values)
    scale = (high - low) / (levels - 1)
    return scale, -low / scale


def nearest(value: float, scale: float, zero: float, levels: int) -> int:
    """Return the code whose lattice point is nearest to `value`."""
    return min(range(levels), key=lambda code: abs((code - zero) * scale - value))


def error_bound(
    value: float, scale: float, zero: float, levels: int, dtype: torch.dtype, spacing: float | None = None
) -> float:
    """Return how far a value may be from what its nearest lattice point dequantises to.

    Half a step (or the distance to the lattice's end, for values outside it), and what rounding adds: zero, scale,
    difference and product are each rounded to `dtype` (relative error u, or half the spacing of subnormal numbers),
    and the code was chosen by float32 arithmetic on numbers up to |zero| + levels.
    """
    u = torch.finfo(dtype).eps / 2
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2 if spacing is None else spacing
    lowest, highest = sorted(((0 - zero) * scale, (levels - 1 - zero) * scale))
    step = max(abs(scale) / 2, lowest - value, value - highest)
    reach = abs(value) + step  # of the lattice point
    storage = abs(scale) * abs(zero) * u + 3.01 * u * (reach + abs(scale) * abs(zero) * u)
    subnormal = least * (1 + levels + abs(zero) + 2 * abs(scale))
    choice = 4 * 2.0**-24 * abs(scale) * (abs(zero) + levels)
    return step + storage + subnormal + choice
