"""The order of codes in a prepared weight: what each lane of a warp multiplies lies where that lane loads it.

The matrix instructions take the weight as their tall operand: 16 output features (a row tile) by 16 inputs, spread over
the 32 lanes of a warp. Lane l = 4 g + c holds rows g and g + 8. A block of 64 inputs is four instructions, s = 0 … 3;
inputs may come in any order as long as both operands agree, so lane column c takes the 16 neighbours 64 b + 16 c + j
and instruction s those with j = 4 s … 4 s + 3. What one lane gives to one instruction are four pairs of codes,

    a0 = row g, j = 4s, 4s+1     a1 = row g+8, the same     a2 = row g, j = 4s+2, 4s+3     a3 = row g+8, the same

and a pair is a 32-bit register whose halves are the two elements. So a pair's codes are stored 16 bits apart in a
32-bit word, and one mask takes both (see cuda/fragments.cuh), or four bytes of a row (see cuda/byte_codes.cuh).

For each block of 64 inputs a lane has as many words as a code has bits. Where these divide 16, the codes of a half-word
follow one another: a0, a1, a2, a3 of an instruction, then those of the next one. Three-bit codes lie as those of four
bits do, but packed into the low six bits of each byte (row g, then row g + 8), so that words 0 to 2 have instructions 0
to 2; the two bits that their bytes leave over are, one after the other, the six bits of that byte for instruction 3.

Storage is [row tiles, chunks, loads, 32 lanes, 4 words]: a load is 16 bytes for each lane, 512 contiguous bytes for a
warp, and a chunk is as many blocks as it takes to fill loads. Of the four blocks of a chunk of three-bit codes, the
first three have a load each, and word i of the last one is the fourth word of load i.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

TILE_ROWS = 16
BLOCK_INPUTS = 64
_LANE_GROUPS, _LANE_COLUMNS = 8, 4
_STEPS, _PAIRS, _HALVES = 4, 2, 2


class Piece(NamedTuple):
    """Bits `shift` to `shift + size - 1` of a code, from bit `bit` of word `word` on."""

    word: int
    bit: int
    shift: int
    size: int


def pieces(bits: int, step: int, pair: int, row: int, half: int) -> tuple[Piece, ...]:
    """Return where a code lies: instruction `step`, inputs `pair`, row g + 8 `row`, element `half`, each from 0 on."""
    if bits != 3:
        index, per_half = _STEPS * step + 2 * pair + row, 16 // bits
        return (Piece(index // per_half, 16 * half + index % per_half * bits, 0, bits),)
    byte = 16 * half + 8 * pair
    if step < 3:
        return (Piece(step, byte + 3 * row, 0, 3),)
    if row == 0:
        return Piece(0, byte + 6, 0, 2), Piece(1, byte + 6, 2, 1)
    return Piece(1, byte + 7, 0, 1), Piece(2, byte + 6, 1, 2)


def chunk_blocks(bits: int) -> int:
    """Return how many blocks of 64 inputs it takes until their words fill whole 16-byte loads."""
    return 4 // math.gcd(4, bits)


def padded_inputs(inputs: int, bits: int) -> int:
    """Return `inputs` rounded up to whole chunks."""
    step = BLOCK_INPUTS * chunk_blocks(bits)
    return -(-inputs // step) * step


def arrange(codes: Tensor, bits: int) -> Tensor:
    """Return codes [T, 16, K] (uint8, K padded) in tile order: int32 [T, chunks, loads, 32, 4]."""
    tiles, _, inputs = codes.shape
    blocks = inputs // BLOCK_INPUTS
    fields = codes.reshape(
        tiles, _HALVES, _LANE_GROUPS, blocks, _LANE_COLUMNS, _STEPS, _PAIRS, _HALVES
    )  # row + 8, g, block, c, step, pair, element
    words = torch.zeros(
        (tiles, blocks, _LANE_GROUPS, _LANE_COLUMNS, bits), dtype=torch.int32, device=codes.device
    )
    for step, pair, row, half in _positions():
        code = fields[:, row, :, :, :, step, pair, half].transpose(1, 2)  # [T, blocks, g, c]
        for word, bit, shift, size in pieces(bits, step, pair, row, half):
            part = (code >> shift) & ((1 << size) - 1)
            words[..., word] |= part.to(torch.int32) << bit
    return _to_loads(words.reshape(tiles, blocks, 32, bits)).contiguous()


def restore(tiled: Tensor, bits: int) -> Tensor:
    """Return the codes [T, 16, K] (uint8) of what `arrange` returned."""
    words = _from_loads(tiled, bits)
    tiles, blocks = words.shape[:2]
    words = words.reshape(tiles, blocks, _LANE_GROUPS, _LANE_COLUMNS, bits)
    codes = torch.zeros(
        (tiles, _HALVES, _LANE_GROUPS, blocks, _LANE_COLUMNS, _STEPS, _PAIRS, _HALVES),
        dtype=torch.uint8,
        device=tiled.device,
    )
    for step, pair, row, half in _positions():
        for word, bit, shift, size in pieces(bits, step, pair, row, half):
            part = ((words[..., word] >> bit) & ((1 << size) - 1)).to(torch.uint8)
            codes[:, row, :, :, :, step, pair, half] |= (part << shift).transpose(1, 2)
    return codes.reshape(tiles, TILE_ROWS, blocks * BLOCK_INPUTS)


def _positions() -> list[tuple[int, int, int, int]]:
    return [
        (step, pair, row, half)
        for step in range(_STEPS)
        for pair in range(_PAIRS)
        for row in range(_HALVES)
        for half in range(_HALVES)
    ]


def _to_loads(words: Tensor) -> Tensor:
    """Return words [T, blocks, 32, bits] as 16-byte loads [T, chunks, loads, 32, 4]."""
    tiles, blocks, lanes, bits = words.shape
    per_chunk = chunk_blocks(bits)
    split = words.reshape(tiles, blocks // per_chunk, per_chunk, lanes, bits)
    if bits == 3:
        last = split[:, :, 3].transpose(2, 3)[..., None]
        return torch.cat([split[:, :, :3], last], dim=-1)
    # One block in several loads, or several blocks in one load.
    split = split.transpose(2, 3).reshape(tiles, -1, lanes, per_chunk * bits // 4, 4)
    return split.transpose(2, 3)


def _from_loads(loads: Tensor, bits: int) -> Tensor:
    """Undo `_to_loads`."""
    tiles, chunks, _, lanes, _ = loads.shape
    per_chunk = chunk_blocks(bits)
    if bits == 3:
        last = loads[..., 3].transpose(2, 3)[:, :, None]
        split = torch.cat([loads[..., :3], last], dim=2)
    else:
        split = loads.transpose(2, 3).reshape(tiles, chunks, lanes, per_chunk, bits).transpose(2, 3)
    return split.reshape(tiles, chunks * per_chunk, lanes, bits)
