"""Attention among the tokens of prompts that are padded on the left."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# From torch 2.5 on, flash attention takes fewer key heads than query heads.
_GROUPED = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 5)


def prompt_mask(begins: Tensor, tokens: int, window: int | None) -> Tensor:
    """Return which keys [B, 1, M, M] each token attends to, itself always: rows begin at `begins` [B]."""
    place = torch.arange(tokens, device=begins.device)
    query, key = place[:, None], place[None, :]
    seen = (key <= query) & (key >= begins[:, None, None])
    if window is not None:
        seen &= key > query - window
    # Padding sees itself, or its softmax would be one of nothing.
    return (seen | (key == query))[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return the attention's result [B, H, M, D] for q of that shape, k and v [B, KV, M, D]; causal without a mask."""
    group = q.shape[1] // k.shape[1]
    flash = q.is_cuda and q.dtype != torch.float32 and mask is None
    if group > 1 and flash and _GROUPED:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
