"""Bit packing: one table of formats, one `pack`, one `unpack`.

A format stacks `fields` codes in each storage element. The codes are a matrix [R, C]; field i of packed row r holds
row `r + i * packed_rows`, the first field in the highest bits. Rows that do not fill the last fields are padded with
zeros, so any row count packs; `unpack` is told how many rows to keep. The bytes are those of hqq 0.1.1 to 0.2.8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hqq.errors import ConfigError, DtypeError, ShapeError


@dataclass(frozen=True)
class PackFormat:
    """How codes lie in memory: `fields` codes of `bits` bits in each element of `dtype`."""

    name: str
    bits: int
    fields: int
    dtype: torch.dtype

    @property
    def shifts(self) -> tuple[int, ...]:
        """Right shift of each field, first field (highest bits) first."""
        return tuple(self.bits * (self.fields - 1 - i) for i in range(self.fields))

    @property
    def mask(self) -> int:
        """Bit mask of one field."""
        return (1 << self.bits) - 1

    def packed_rows(self, rows: int) -> int:
        """Number of packed rows that hold `rows` rows of codes."""
        return -(-rows // self.fields)


FORMATS: dict[str, PackFormat] = {
    f.name: f
    for f in (
        PackFormat("8bit_u8", 8, 1, torch.uint8),
        PackFormat("4bit_u8", 4, 2, torch.uint8),
        PackFormat("3bit_32", 3, 10, torch.int32),
        PackFormat("2bit_u8", 2, 4, torch.uint8),
        PackFormat("1bit_u8", 1, 8, torch.uint8),
    )
}

# 6 and 5 bit codes take a whole byte, and the three levels of 1.58 bit take two bits: that is the wire format.
FORMAT_OF_BITS: dict[float, str] = {
    8: "8bit_u8",
    6: "8bit_u8",
    5: "8bit_u8",
    4: "4bit_u8",
    3: "3bit_32",
    2: "2bit_u8",
    1.58: "2bit_u8",
    1: "1bit_u8",
}

SUPPORTED_BITS: tuple[float, ...] = tuple(FORMAT_OF_BITS)


def max_code(nbits: float) -> int:
    """Largest code at `nbits` bits: 2^nbits - 1, rounded (2 for 1.58 bit)."""
    return round(2**nbits - 1)


def check_nbits(nbits: float) -> float:
    """Return `nbits` as one of SUPPORTED_BITS (an int, but for 1.58); raises ConfigError for any other value."""
    if isinstance(nbits, bool) or not isinstance(nbits, (int, float)) or nbits not in FORMAT_OF_BITS:
        raise ConfigError(f"got nbits={nbits!r}; expected one of {', '.join(map(str, SUPPORTED_BITS))}")
    return int(nbits) if float(nbits).is_integer() else nbits


def format_named(name: str) -> PackFormat:
    """Return the format called `name`; raises ConfigError for a name that is not in the table."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ConfigError(f"got packing={name!r}; expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def pack(codes: Tensor, fmt: PackFormat) -> Tensor:
    """Pack `codes` [R, ...] (any dtype, values 0 … fmt.mask) into [ceil(R / fields), ...] of fmt.dtype."""
    if codes.ndim == 0:
        raise ShapeError("got a 0-d tensor of codes; expected at least one dimension")
    codes = codes.to(fmt.dtype)
    if fmt.fields == 1:
        return codes
    rows = fmt.packed_rows(codes.shape[0])
    missing = rows * fmt.fields - codes.shape[0]
    if missing:
        codes = torch.cat([codes, codes.new_zeros((missing, *codes.shape[1:]))])
    fields = codes.reshape(fmt.fields, rows, *codes.shape[1:])
    packed = fields[0] << fmt.shifts[0]
    for field, shift in zip(fields[1:], fmt.shifts[1:], strict=True):
        packed |= field << shift
    return packed


def unpack(W_q: Tensor, fmt: PackFormat, rows: int | None = None, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Unpack `W_q` [P, ...] of fmt.dtype into codes [rows, ...] of `dtype`; all P * fields rows without `rows`."""
    if W_q.dtype != fmt.dtype:
        raise DtypeError(f"got packed codes of {W_q.dtype}; {fmt.name} holds them as {fmt.dtype}")
    if fmt.fields == 1:
        codes = W_q
    else:
        codes = torch.stack([((W_q >> shift) & fmt.mask).to(torch.uint8) for shift in fmt.shifts])
        codes = codes.reshape(fmt.fields * W_q.shape[0], *W_q.shape[1:])
    if rows is not None:
        if rows > codes.shape[0]:
            raise ShapeError(f"got packed codes for {codes.shape[0]} rows; expected at least {rows}")
        codes = codes[:rows]
    return codes.to(dtype)


class BitPack:
    """The formats as static functions under their original names; `pack` and `unpack` do the work."""

    @staticmethod
    def pack_8bit_u8(W_q: Tensor) -> Tensor:
        return pack(W_q, FORMATS["8bit_u8"])

    @staticmethod
    def unpack_8bit_u8(W_q: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
        return unpack(W_q, FORMATS["8bit_u8"], dtype=dtype)

    @staticmethod
    def pack_4bit_u8(W_q: Tensor) -> Tensor:
        return pack(W_q, FORMATS["4bit_u8"])

    @staticmethod
    def unpack_4bit_u8(W_q: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
        return unpack(W_q, FORMATS["4bit_u8"], dtype=dtype)

    @staticmethod
    def pack_3bit_32(W_q_in: Tensor) -> Tensor:
        return pack(W_q_in, FORMATS["3bit_32"])

    @staticmethod
    def unpack_3bit_32(W_q: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
        return unpack(W_q, FORMATS["3bit_32"], dtype=dtype)

    @staticmethod
    def pack_2bit_u8(W_q: Tensor) -> Tensor:
        return pack(W_q, FORMATS["2bit_u8"])

    @staticmethod
    def unpack_2bit_u8(W_q: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
        return unpack(W_q, FORMATS["2bit_u8"], dtype=dtype)

    @staticmethod
    def pack_1bit_u8(W_q: Tensor) -> Tensor:
        return pack(W_q, FORMATS["1bit_u8"])

    @staticmethod
    def unpack_1bit_u8(W_q: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
        return unpack(W_q, FORMATS["1bit_u8"], dtype=dtype)
