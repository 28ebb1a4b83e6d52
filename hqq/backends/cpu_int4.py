"""torch's int4 product on the CPU as operators: the product, fast for many tokens too, and the way back to codes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hqq.backends.nibbles import nibble_places, unpack_nibbles

# torch packs blocks of 16, 32 or 64 rows, whatever suits the CPU, each by itself.
_BLOCK_ROWS = 64
# For more tokens than these, one product with floats is faster (measured), made of so many rows at a time.
_FEW = 256
_ROWS = 256
_MIDDLE = 8


def pack_codes(codes: Tensor) -> Tensor:
    """Return codes [N, K] (0 … 15) in torch's arrangement for this CPU: uint8 [N, K / 2]."""
    return torch._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)


# Operators, so that a compiler traces neither how the order is found nor the loops.
@torch.library.custom_op("hqq::cpu_int4_codes", mutates_args=())
def unpack_codes(packed: Tensor, N: int, K: int) -> Tensor:
    """Return the codes [N, K] (uint8) of what `pack_codes` returned."""
    octets = packed.reshape(-1)
    whole = N // _BLOCK_ROWS * _BLOCK_ROWS
    parts = []
    for rows, start, stop in ((_BLOCK_ROWS, 0, whole), (N - whole, whole, N)):
        if stop > start:
            places = nibble_places(pack_codes, rows, K, packed.device)
            blocks = octets[start * K // 2 : stop * K // 2].reshape((stop - start) // rows, -1)
            parts.append(unpack_nibbles(blocks, places).reshape(-1, K))
    return torch.cat(parts)


@unpack_codes.register_fake
def _(packed: Tensor, N: int, K: int) -> Tensor:
    return packed.new_empty((N, K), dtype=torch.uint8)


@torch.library.custom_op("hqq::cpu_int4_linear", mutates_args=())
def int4_linear(x: Tensor, packed: Tensor, s_and_z: Tensor, N: int) -> Tensor:
    """Return `x @ W^T` with W = (codes - 8) s + z: x [M, K], s_and_z [groups, N, 2], result [M, N], all bfloat16."""
    K, G = x.shape[1], s_and_z.shape[0]
    if x.shape[0] <= _FEW:
        return torch._weight_int4pack_mm_for_cpu(x, packed, K // G, s_and_z)
    codes = (unpack_codes(packed, N, K).view(torch.int8) - _MIDDLE).reshape(N, G, K // G)
    y, floats = x.new_empty(x.shape[0], N), x.new_empty(min(N, _ROWS), G, K // G)
    for start in range(0, N, _ROWS):
        rows = slice(start, min(start + _ROWS, N))
        W = floats[: rows.stop - start]
        s, z = s_and_z[:, rows].transpose(0, 1).unbind(-1)
        torch.mul(codes[rows], s[..., None], out=W).add_(z[..., None])
        y[:, rows] = F.linear(x, W.reshape(-1, K))
    return y


@int4_linear.register_fake
def _(x: Tensor, packed: Tensor, s_and_z: Tensor, N: int) -> Tensor:
    return x.new_empty((x.shape[0], N))
