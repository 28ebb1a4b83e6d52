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
def nibble_order(pack: Pack, rows: int, columns: int, device: torch.device) -> Tensor:
    """Return which element of a matrix of codes [rows, columns] each nibble of `pack(matrix)` holds: int64 [nibbles].

    `pack` takes int32 codes and must only move them. It is asked to pack the digits, in base 16, of every element's
    own number, so that the packed digits together tell where every element went.
    """
    number = torch.arange(rows * columns, device=device)
    order = torch.zeros(rows * columns, dtype=torch.int64, device=device)
    for shift in range(0, (rows * columns - 1).bit_length(), 4):
        digits = ((number >> shift) & 15).to(torch.int32).reshape(rows, columns)
        order |= nibbles(pack(digits)).flatten().to(torch.int64) << shift
    return order


def unpack_nibbles(packed: Tensor, order: Tensor) -> Tensor:
    """Return the codes (uint8) [blocks, codes] of blocks [blocks, bytes of one], each packed in `order`."""
    codes = torch.empty((packed.shape[0], order.numel()), dtype=torch.uint8, device=packed.device)
    codes[:, order] = nibbles(packed)
    return codes
