"""The order of codes in a prepared weight: what each lane of a warp multiplies lies where that lane loads it.

The matrix instructions take the weight as their tall operand: 16 output features (a row tile) by 16 inputs, spread over
the 32 lanes of a warp. Lane l = 4 g + c holds rows g and g + 8. A block of 64 inputs is four instructions, s = 0 … 3;
inputs may come in any order as long as both operands agree, so lane column c takes the 16 neighbours 64 b + 16 c + j
and instruction s those with j = 4 s … 4 s + 3. What one lane gives to one instruction are four pairs of codes,

    a0 = row g, j = 4s, 4s+1     a1 = row g+8, the same     a2 = row g, j = 4s+2, 4s+3     a3 = row g+8, the same

and a pair is a 32-bit register whose halves are the two elements. So a pair's codes are stored 16 bits apart in a
32-bit word, and one shift and one logical instruction turn them into two floats (see cuda/codes.cuh).

Storage is [row tiles, chunks, loads, 32 lanes, 4 words]: a load is 16 bytes for each lane, 512 contiguous bytes for a
warp. Three bits are two planes, the two low bits and the third, so that three bits take three.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE_ROWS = 16
BLOCK_INPUTS = 64
_LANE_GROUPS, _LANE_COLUMNS = 8, 4
_STEPS, _PAIRS, _HALVES = 4, 2, 2


@dataclass(frozen=True)
class Plane:
    """Some bits of every code: `bits` of them from bit `shift` on.

    `rows_inside`: of the four pairs of an instruction, the row (g, g + 8) changes faster than the inputs; otherwise the
    inputs do. The third bits of 3-bit codes are the other way round, where they meet the low bits after one shift.
    """

    bits: int
    shift: int
    rows_inside: bool = True

    @property
    def words(self) -> int:
        """Words that a lane has of a block of 64 inputs."""
        return self.bits

    def field(self, step: int, pair: int, row: int, half: int) -> tuple[int, int]:
        """Return (word, bit) of the code at instruction `step`, inputs `pair`, row g + 8 `row`, element `half`."""
        index = _STEPS * step + (2 * pair + row if self.rows_inside else pair + 2 * row)
        per_half = 16 // self.bits
        return index // per_half, 16 * half + index % per_half * self.bits


# Stored bits -> planes. 5 and 6 bit codes are stored in 8 bits, 1.58 bit codes in 2.
PLANES: dict[int, tuple[Plane, ...]] = {
    8: (Plane(8, 0),),
    4: (Plane(4, 0),),
    3: (Plane(2, 0), Plane(1, 2, rows_inside=False)),
    2: (Plane(2, 0),),
    1: (Plane(1, 0),),
}


def chunk_blocks(bits: int) -> int:
    """Return how many blocks of 64 inputs it takes until every plane fills whole 16-byte loads."""
    return max(4 // min(plane.words, 4) for plane in PLANES[bits])


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
    per_chunk = chunk_blocks(bits)
    planes = []
    for plane in PLANES[bits]:
        shape = (tiles, blocks, _LANE_GROUPS, _LANE_COLUMNS, plane.words)
        words = torch.zeros(shape, dtype=torch.int32, device=codes.device)
        for step, pair, row, half in _positions():
            word, bit = plane.field(step, pair, row, half)
            code = fields[:, row, :, :, :, step, pair, half].transpose(1, 2)  # [T, blocks, g, c]
            part = (code >> plane.shift) & ((1 << plane.bits) - 1)
            words[..., word] |= part.to(torch.int32) << bit
        planes.append(_to_loads(words.reshape(tiles, blocks, 32, plane.words), per_chunk))
    return torch.cat(planes, dim=2).contiguous()


def restore(tiled: Tensor, bits: int) -> Tensor:
    """Return the codes [T, 16, K] (uint8) of what `arrange` returned."""
    per_chunk = chunk_blocks(bits)
    tiles, blocks = tiled.shape[0], tiled.shape[1] * per_chunk
    codes = torch.zeros(
        (tiles, _HALVES, _LANE_GROUPS, blocks, _LANE_COLUMNS, _STEPS, _PAIRS, _HALVES),
        dtype=torch.uint8,
        device=tiled.device,
    )
    first = 0
    for plane in PLANES[bits]:
        loads = per_chunk * plane.words // 4
        words = _from_loads(tiled[:, :, first : first + loads], per_chunk, plane.words)
        words = words.reshape(tiles, blocks, _LANE_GROUPS, _LANE_COLUMNS, plane.words)
        first += loads
        for step, pair, row, half in _positions():
            word, bit = plane.field(step, pair, row, half)
            part = ((words[..., word] >> bit) & ((1 << plane.bits) - 1)).to(torch.uint8)
            codes[:, row, :, :, :, step, pair, half] |= (part << plane.shift).transpose(1, 2)
    return codes.reshape(tiles, TILE_ROWS, blocks * BLOCK_INPUTS)


def _positions() -> list[tuple[int, int, int, int]]:
    return [
        (step, pair, row, half)
        for step in range(_STEPS)
        for pair in range(_PAIRS)
        for row in range(_HALVES)
        for half in range(_HALVES)
    ]


def _to_loads(words: Tensor, per_chunk: int) -> Tensor:
    """Return a plane's words [T, blocks, 32, W] as 16-byte loads [T, chunks, loads, 32, 4]."""
    tiles, blocks, lanes, count = words.shape
    chunks = blocks // per_chunk
    if count >= 4:  # several loads for a block
        split = words.reshape(tiles, chunks, per_chunk, lanes, count // 4, 4).transpose(3, 4)
    else:  # several blocks in a load
        together = 4 // count
        split = words.reshape(tiles, chunks, per_chunk // together, together, lanes, count).transpose(3, 4)
    return split.reshape(tiles, chunks, per_chunk * count // 4, lanes, 4)


def _from_loads(loads: Tensor, per_chunk: int, count: int) -> Tensor:
    """Undo `_to_loads`."""
    tiles, chunks, _, lanes, _ = loads.shape
    if count >= 4:
        split = loads.reshape(tiles, chunks, per_chunk, count // 4, lanes, 4).transpose(3, 4)
    else:
        together = 4 // count
        split = loads.reshape(tiles, chunks, per_chunk // together, lanes, together, count).transpose(3, 4)
    return split.reshape(tiles, chunks * per_chunk, lanes, count)
