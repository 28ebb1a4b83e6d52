"""torch's own int4 product on CUDA ("tinygemm"), which torchao made known; torchao itself is not needed."""

from __future__ import annotations

import torch
from torch import Tensor

from hqq.backends.int4 import Int4Weight, why_not_int4
from hqq.backends.nibbles import nibble_places, unpack_nibbles
from hqq.core.qtensor import QSpec, QTensor

# torch packs blocks of 8 outputs by 16 * inner_k_tiles inputs, each by itself.
_BLOCK_ROWS, _TILE = 8, 16
_INNER_K_TILES = (8, 4, 2)
_OLDEST = (8, 0)


def _pack(codes: Tensor) -> Tensor:
    """Return codes [N, K] as torch packs them: [N / 8, K / (16 t), 32, t / 2] (int32), t the inner k tiles."""
    pairs = codes.to(torch.uint8)
    return torch._convert_weight_to_int4pack(
        (pairs[:, ::2] << 4 | pairs[:, 1::2]).contiguous(), _tiles(codes.shape[1])
    )


def _tiles(K: int) -> int:
    return next(tiles for tiles in _INNER_K_TILES if K % (_TILE * tiles) == 0)


# An operator of its own: a compiler is not to trace how the order is found.
@torch.library.custom_op("hqq::tinygemm_codes", mutates_args=())
def _unpack(packed: Tensor, N: int, K: int) -> Tensor:
    """Return the codes [N, K] (uint8) of what `_pack` returned."""
    columns = _TILE * _tiles(K)
    blocks = N // _BLOCK_ROWS, K // columns
    places = nibble_places(_pack, _BLOCK_ROWS, columns, packed.device)
    codes = unpack_nibbles(packed.reshape(blocks[0] * blocks[1], -1), places)
    return codes.reshape(*blocks, _BLOCK_ROWS, columns).transpose(1, 2).reshape(N, K)


@_unpack.register_fake
def _(packed: Tensor, N: int, K: int) -> Tensor:
    return packed.new_empty((N, K), dtype=torch.uint8)


class TinygemmWeight(Int4Weight):
    """A weight for `aten::_weight_int4pack_mm` on CUDA."""

    backend = "torchao_int4"
    always_exact = False  # a second kernel takes as long as the first

    def pack_codes(self, codes: Tensor) -> Tensor:
        return _pack(codes)

    def unpack_codes(self) -> Tensor:
        codes: Tensor = _unpack(self.packed, *self.spec.shape)
        return codes

    def product(self, x: Tensor) -> Tensor:
        y: Tensor = torch._weight_int4pack_mm(x, self.packed, self.group_size, self.s_and_z)
        return y


class TinygemmBackend:
    """bfloat16, axis 1, at most 4 bits, groups of 32 to 256, compute capability 8.0 and newer."""

    name = "torchao_int4"

    def available(self) -> str | None:
        if not torch.cuda.is_available():
            return "torch sees no CUDA device on this machine"
        if not hasattr(torch, "_weight_int4pack_mm"):
            return f"torch {torch.__version__} has no int4 product"
        return None

    def supports(self, spec: QSpec, compute_dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"the weight is on {device}, and torch's int4 product for GPUs takes CUDA tensors"
        if torch.cuda.get_device_capability(device) < _OLDEST:
            return "torch's int4 product needs a GPU of compute capability 8.0 or newer"
        return why_not_int4(spec, compute_dtype, _BLOCK_ROWS, _TILE * _INNER_K_TILES[-1])

    def prepare(self, q: QTensor, dtype: torch.dtype) -> TinygemmWeight:
        return TinygemmWeight(q, dtype)


MATMUL = TinygemmBackend()
