"""What follows from a chosen token: the end of a decoding step, for the kernels that choose."""

# Written in Triton's language, which is not quite Python.
# mypy: ignore-errors

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """What choosing a token changes in place.

    positions [B] (int32) is the place of the last token that the model was fed, and one further afterwards; there, ids
    [B, L] (int64) gets the chosen token, as does token [B, 1] (int64): `pad` for a row that is finished. finished [B]
    (bool) becomes true with a token that is one of ends [E] (int64).
    """

    token: Tensor
    finished: Tensor
    ids: Tensor
    positions: Tensor
    ends: Tensor
    pad: int

    def arguments(self) -> tuple[object, ...]:
        """Return what kernels take for `move_on`, in its order up to `pad`."""
        tensors = (self.token, self.finished.view(torch.int8), self.ids, self.positions, self.ends)
        return (*tensors, self.ids.stride(0), self.pad)

    def constants(self) -> dict[str, int]:
        """Return the constants that `move_on` is compiled for."""
        count = len(self.ends)
        return {"ENDS": count, "ENDS_PAD": triton.next_power_of_2(max(1, count))}


@triton.jit
def move_on(
    row,
    choice,
    token,
    finished,
    ids,
    positions,
    ends,
    ids_stride,
    pad,
    ENDS: tl.constexpr,
    ENDS_PAD: tl.constexpr,
):
    """Make `choice` the next token of `row`, unless the row is finished, and return what became the next token."""
    over = tl.load(finished + row) != 0
    chosen = tl.where(over, pad, choice).to(tl.int64)
    if ENDS > 0:
        e = tl.arange(0, ENDS_PAD)
        same = (tl.load(ends + e, mask=e < ENDS, other=-1) == chosen).to(tl.int32)
        tl.store(finished + row, (over | (tl.sum(same, 0) > 0)).to(tl.int8))
    position = tl.load(positions + row) + 1
    tl.store(token + row, chosen)
    tl.store(ids + row * ids_stride + position, chosen, mask=position < ids_stride)
    tl.store(positions + row, position)
    return chosen
