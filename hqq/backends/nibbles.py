"""Getting 4-bit codes back out of an arrangement that only its packing function knows."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

Pack = Callable[[Tensor], Tensor]


def nibbles(packed: Tensor) -> Tensor:
    """Return the two 4-bit halves of every byte of `packed` (any dtype), [..., 2 * bytes of the last dimension]."""
    octets = packed.contiguous().view(torch.uint8)
    return torch.stack([octets & 15, octets >> 4], dim=-1).flatten(-2)


@lru_cache(maxsize=16)
def nibble_places(pack: Pack, rows: int, columns: int, device: torch.device) -> Tensor:
    """Return at which nibble of `pack(matrix)` each code of a matrix [rows, columns] lies: int32 [rows * columns].

    `pack` takes int32 codes and must only move them. It is asked to pack the digits, in base 16, of every element's
    own number, so that the packed digits together tell where every element went.
    """
    number = torch.arange(rows * columns, device=device)
    held = torch.zeros(rows * columns, dtype=torch.int64, device=device)
    for shift in range(0, (rows * columns - 1).bit_length(), 4):
        digits = ((number >> shift) & 15).to(torch.int32).reshape(rows, columns)
        held |= nibbles(pack(digits)).flatten().to(torch.int64) << shift
    places = torch.empty_like(number)
    places[held] = number
    return places.to(torch.int32)


def unpack_nibbles(packed: Tensor, places: Tensor) -> Tensor:
    """Return the codes (uint8) [blocks, codes] of blocks [blocks, bytes of one], each packed in the same order."""
    held = nibbles(packed)
    if held.device.type != "cpu":
        return held.index_select(1, places)
    # Vector by vector, which torch's CPU code is three times faster at.
    codes = torch.empty((held.shape[0], places.numel()), dtype=torch.uint8)
    for block, its_codes in zip(held, codes, strict=True):
        torch.index_select(block, 0, places, out=its_codes)
    return codes
