"""What a tiled weight stands for, in torch operations: for devices without the kernels, and to compare them with."""

from __future__ import annotations

import torch
from torch import Tensor

from hqq.kernels.tile_layout import BLOCK_INPUTS, TILE_ROWS, restore


def dequantize_tiles(
    codes: Tensor, meta: Tensor, rows: Tensor, bits: int, axis: int, group_size: int, N: int, K: int
) -> Tensor:
    """Return the weight [N, K] in the dtype of `meta`, both steps of `(W_q - zero) * scale` rounded to it.

    The tensors are those of a `TiledWeight`.
    """
    values = restore(codes, bits).to(meta.dtype)  # [T, 16, K padded]
    tiles, _, padded = values.shape
    if axis == 1:
        groups = meta.shape[1]
        # [T, groups, g, row + 8, 2] -> [T, 16, groups, 2]
        by_row = (
            meta.reshape(*meta.shape[:3], 2, 2).permute(0, 3, 2, 1, 4).reshape(tiles, TILE_ROWS, groups, 2)
        )
        group = torch.arange(padded, device=meta.device) // group_size if groups > 1 else None
        scale, zero = (
            by_row[..., i] if group is None else by_row[..., i].index_select(2, group) for i in range(2)
        )
    else:
        row = torch.arange(tiles, device=meta.device) // (group_size // TILE_ROWS)
        by_input = meta.transpose(1, 2).reshape(meta.shape[0], 2, -1, BLOCK_INPUTS).flatten(2)
        scale, zero = (by_input[:, i].index_select(0, row)[:, None] for i in range(2))
        scale = torch.ldexp(scale, -rows[:, 3, None, None]).to(meta.dtype)
    weight = (values - zero) * scale
    member = torch.arange(TILE_ROWS, device=rows.device)
    output = rows[:, :1] + rows[:, 1:2] * member
    real = member < rows[:, 2:3]
    result = meta.new_empty((N, padded))
    result[output[real].long()] = weight[real]
    return result[:, :K].contiguous()
