"""Attention of a decoding step: one query token per row against a static cache, of which the filled part is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqq.kernels import decode_launch
from hqq.kernels.availability import interpreting
from hqq.kernels.decode_attention_kernel import attention_kernel, join_kernel
from hqq.kernels.decode_launch import options, processors
from hqq.kernels.device import on

# Places of the cache at a time, warps, and stages of Triton's pipeline, as measured on an H200: for a cache in parts,
# which are short, and for rows whose cache is whole, if little enough shared memory holds the stages.
_PARTS = (64, 4, 1)
_WHOLE = (32, 2, 3)
_WHOLE_BYTES = 256  # of a head
_JOIN_WARPS = 2
_MOST_SPLITS = 32


@dataclass(frozen=True)
class AttentionSpace:
    """Memory that `decode_attention` works in; one serves all layers and steps of one batch size."""

    sums: Tensor
    stats: Tensor

    @classmethod
    def make(
        cls, rows: int, kv_heads: int, group: int, head: int, length: int, device: torch.device
    ) -> AttentionSpace:
        """Return the memory for `rows` rows, and with it the number of parts that the cache of `length` is cut into."""
        wanted = max(1, 2 * processors(device) // (rows * kv_heads))
        splits = min(_MOST_SPLITS, triton.next_power_of_2(triton.cdiv(length, _PARTS[0])))
        while splits > wanted:
            splits //= 2
        parts = (rows, kv_heads, splits, group)
        return cls(
            torch.empty(*parts, head, dtype=torch.float32, device=device),
            torch.empty(*parts, 2, dtype=torch.float32, device=device),
        )


@dataclass(frozen=True)
class HeadNorm:
    """Weights [head size] of the RMS norms of query and key heads, and what is added to the mean square."""

    q: Tensor
    k: Tensor
    eps: float


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    begins: Tensor,
    positions: Tensor,
    scale: float,
    space: AttentionSpace,
    norm: HeadNorm | None = None,
    window: int | None = None,
) -> Tensor:
    """Rotate the new query and key, write key and value into the cache, and return the attention's result [B, H * D].

    q [B, H * D], k and v [B, KV * D] with contiguous rows: what the projections give. keys, values [B, KV, length, D]:
    the cache, of which a row fills the places from begins [B] (int32) to positions [B] (int32), where the new token
    goes. cos, sin [length, D], by distance from the row's beginning, in the dtype of q. `norm` normalises heads before
    they are rotated; `window` is how many tokens, itself included, a token sees.

    Rounds where transformers rounds; scores and sums are kept in fp32. The same input gives the same bits.
    """
    rows, kv_heads, length, head = keys.shape
    group = q.shape[1] // (kv_heads * head)
    out = decode_launch.new_output(q, q.shape[1])
    weights = (q, k) if norm is None else (norm.q, norm.k)
    window = length if window is None else window
    splits = space.sums.shape[2]
    head_pad = max(16, triton.next_power_of_2(head))
    whole = splits == 1 and head_pad * q.element_size() <= _WHOLE_BYTES
    block, warps, stages = _WHOLE if whole else _PARTS
    common = {
        "GROUP": group,
        "HEAD": head,
        "HEAD_PAD": head_pad,
        "SPLITS": splits,
        "BLOCK": block,
        **options(q.device, q.dtype),
    }
    with on(q.device):
        attention_kernel[(splits, kv_heads, rows)](
            q,
            k,
            v,
            keys,
            values,
            cos,
            sin,
            *weights,
            begins,
            positions,
            space.sums,
            space.stats,
            out,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            length,
            window,
            scale,
            0.0 if norm is None else norm.eps,
            KV_HEADS=kv_heads,
            GROUP_PAD=max(16, triton.next_power_of_2(group)),
            NORMED=norm is not None,
            AHEAD=stages == 1,
            DOT=tl.float32 if interpreting() else common["DTYPE"],
            num_warps=warps,
            num_stages=stages,
            **common,
        )
        if splits > 1:
            join_kernel[(kv_heads * group, rows)](
                space.sums,
                space.stats,
                begins,
                positions,
                out,
                length,
                window,
                HEADS=kv_heads * group,
                num_warps=_JOIN_WARPS,
                **common,
            )
    return out
