"""TiledWeight: a quantised weight [N, K] in the order in which the matrix-product kernels read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hqq.core.bitpack import pack
from hqq.core.qtensor import QSpec, QTensor
from hqq.errors import ConfigError
from hqq.kernels.tile_layout import BLOCK_INPUTS, TILE_ROWS, arrange, padded_inputs, restore

TILED_DTYPES = (torch.float16, torch.bfloat16)


def tiled_support(spec: QSpec, dtype: torch.dtype) -> str | None:
    """Return None if a weight of `spec` has a tile layout for products in `dtype`, else a sentence."""
    if len(spec.shape) != 2:
        return f"the weight has {len(spec.shape)} dimensions, and the fused kernels take matrices"
    if spec.format is None:
        return "the codes are not packed (bitpack=False)"
    if dtype not in TILED_DTYPES:
        return f"the fused kernels compute in float16 and bfloat16, not in {dtype}"
    if not spec.channel_wise:
        return "the whole tensor is one group (channel_wise=False)"
    N, K = spec.shape
    size = spec.grouping.length
    if spec.axis == 1 and size != K and (K % size or (size not in (16, 32) and size % BLOCK_INPUTS)):
        return (
            f"groups of {size} along {K} inputs; the fused kernels take 16, 32, multiples of 64, whole rows"
        )
    if spec.axis == 0 and (N % size or size % TILE_ROWS):
        return f"groups of {size} along {N} outputs; the fused kernels take multiples of {TILE_ROWS} that divide them"
    return None


@dataclass(frozen=True)
class TiledWeight:
    """A quantised weight in tile order (see tile_layout), with an exact way back.

    Attributes:
        codes: int32 [T, chunks, loads, 32, 4], T row tiles of 16 output features.
        meta: scale and zero. axis=1: [T, groups, 8, 4], for lane group g scale and zero of row g, then of row g + 8.
            axis=0: [R, blocks, 2, 64], the scales, then the zeros of 64 inputs, one row for each R = N / group size;
            scales there are multiplied by the power of two in `rows`.
        rows: int32 [T, 4]: the output feature of a tile's first row, the distance to the next one, how many of the 16
            rows there are, and the exponent of two that scales were multiplied by.
        spec: of the weight; of the first part, with the sum of the outputs, if several were joined.
        parts: the specs of the weights that were joined, in order; just `spec` otherwise.
        stats: scale and zero as they were, for each part, where they were quantised themselves; None otherwise.
    """

    codes: Tensor
    meta: Tensor
    rows: Tensor
    spec: QSpec
    parts: tuple[QSpec, ...]
    stats: tuple[tuple[Tensor | QTensor, Tensor | QTensor] | None, ...]

    @classmethod
    def from_qtensor(cls, q: QTensor, dtype: torch.dtype) -> TiledWeight:
        """Arrange `q`, whose scale and zero become `dtype`; raises ConfigError for what `tiled_support` refuses."""
        reason = tiled_support(q.spec, dtype)
        if reason is not None:
            raise ConfigError(f"got a weight without a tile layout: {reason}")
        spec = q.spec
        codes = q.spec.grouping.ungroup(q.codes(torch.uint8))
        scale, zero = (
            stat.dequantize(dtype) if isinstance(stat, QTensor) else stat.to(dtype)
            for stat in (q.scale, q.zero)
        )
        quantised = isinstance(q.scale, QTensor) or isinstance(q.zero, QTensor)
        exact = not quantised and q.scale.dtype == q.zero.dtype == dtype  # type: ignore[union-attr]
        exponent = _exponent(scale) if spec.axis == 0 else 0
        meta = (
            _meta_axis_1(scale, zero, spec) if spec.axis == 1 else _meta_axis_0(scale, zero, spec, exponent)
        )
        weight = cls(
            codes=arrange(_row_tiles(codes, spec), spec.format.bits),  # type: ignore[union-attr]
            meta=meta,
            rows=_rows(spec, exponent).to(q.device),
            spec=spec,
            parts=(spec,),
            stats=(None if exact else (q.scale, q.zero),),
        )
        return weight._settled()

    @classmethod
    def cat(cls, weights: Sequence[TiledWeight]) -> TiledWeight:
        """Join weights along their outputs, as if their products with the same input were concatenated.

        Raises ConfigError unless they agree in inputs, bits, axis, group size, dtype and device. `split` undoes it.
        """
        first = weights[0]
        for other in weights[1:]:
            if _joinable(other) != _joinable(first):
                raise ConfigError(
                    f"got weights that cannot be joined: {_joinable(first)} and {_joinable(other)}; expected the same "
                    "inputs, bits, axis, group size, dtype and device"
                )
        codes, meta = (torch.cat([getattr(w, name) for w in weights]) for name in ("codes", "meta"))
        return cls.joined(weights, codes, meta)._settled()

    @classmethod
    def joined(cls, weights: Sequence[TiledWeight], codes: Tensor, meta: Tensor) -> TiledWeight:
        """Return `weights` as one that holds `codes` and `meta`, which are theirs one after the other."""
        rows, offset = [], 0
        for weight in weights:
            moved = weight.rows.clone()
            moved[:, 0] += offset
            rows.append(moved)
            offset += weight.spec.shape[0]
        first = weights[0]
        return cls(
            codes=codes,
            meta=meta,
            rows=torch.cat(rows),
            spec=replace(first.parts[0], shape=(offset, first.spec.shape[1])),
            parts=tuple(part for weight in weights for part in weight.parts),
            stats=tuple(stats for weight in weights for stats in weight.stats),
        )

    def split(self) -> list[TiledWeight]:
        """Return the weights that were joined, as views of this one's codes and scales."""
        pieces, tile, row, offset = [], 0, 0, 0
        for spec, stats in zip(self.parts, self.stats, strict=True):
            tiles = -(-spec.shape[0] // TILE_ROWS)
            count = tiles if spec.axis == 1 else spec.shape[0] // spec.grouping.length
            rows = self.rows[tile : tile + tiles].clone()
            rows[:, 0] -= offset
            codes, meta = self.codes[tile : tile + tiles], self.meta[row : row + count]
            pieces.append(TiledWeight(codes, meta, rows, spec, (spec,), (stats,)))
            tile, row, offset = tile + tiles, row + count, offset + spec.shape[0]
        return pieces

    def to_qtensor(self) -> QTensor:
        """Return the weight in the wire format, bit for bit what it was made from; raises ConfigError if joined."""
        if len(self.parts) > 1:
            raise ConfigError(f"got {len(self.parts)} joined weights; split() them first")
        spec = self.spec
        fmt = spec.format
        assert fmt is not None
        N, K = spec.shape
        codes = _matrix(restore(self.codes, fmt.bits), spec)[:N, :K]
        W_q = pack(spec.grouping.group(codes.contiguous()), fmt)
        if spec.view_as_float:
            W_q = W_q.view(self.meta.dtype)
        scale, zero = self.stats[0] or self._plain_stats()
        return QTensor(W_q, scale, zero, spec)

    def _plain_stats(self) -> tuple[Tensor, Tensor]:
        spec, meta = self.spec, self.meta
        N, K = spec.shape
        if spec.axis == 1:
            groups = K // spec.grouping.length
            # [T, groups, 8, (row + 8, scale or zero)] -> [T, row + 8, g, groups, scale or zero]
            by_row = meta.reshape(*meta.shape[:3], 2, 2).permute(0, 3, 2, 1, 4)[:, :, :, :groups]
            both = by_row.reshape(-1, groups, 2)[:N]
        else:
            both = meta.permute(0, 1, 3, 2).reshape(meta.shape[0], -1, 2)[:, :K]
        scale, zero = (both[..., i].reshape(spec.grouping.stat_shape) for i in range(2))
        if spec.axis == 0:
            scale = torch.ldexp(scale, -self.rows[0, 3]).to(meta.dtype)
        return scale.contiguous(), zero.contiguous()

    def to(self, device: torch.device | str) -> TiledWeight:
        """Return the weight with its tensors on `device`."""
        target = torch.device(device)
        stats = tuple(
            None if pair is None else (pair[0].to(target), pair[1].to(target)) for pair in self.stats
        )
        codes, meta, rows = (tensor.to(target) for tensor in (self.codes, self.meta, self.rows))
        return replace(self, codes=codes, meta=meta, rows=rows, stats=stats)._settled()

    def _settled(self) -> TiledWeight:
        """Wait until the tensors are written: kernels load codes before they wait for the kernel in front of them."""
        if self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(self.device).synchronize()
        return self

    @property
    def bits(self) -> int:
        """Bits that a code takes."""
        assert self.spec.format is not None
        return self.spec.format.bits

    @property
    def group_size(self) -> int:
        """Weights in a group."""
        return self.parts[0].grouping.length

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of scale, zero and products."""
        return self.meta.dtype

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept."""
        kept = sum(stat.nbytes for pair in self.stats if pair is not None for stat in pair)
        return self.codes.nbytes + self.meta.nbytes + self.rows.nbytes + kept


def _joinable(weight: TiledWeight) -> tuple[object, ...]:
    K, axis = weight.spec.shape[1], weight.spec.axis
    # Codes of 5 and 6 bits are read as those of 8: only what a kernel sees must agree.
    return (
        K,
        weight.bits,
        axis,
        weight.group_size,
        str(weight.dtype).removeprefix("torch."),
        str(weight.device),
    )


def _row_tiles(codes: Tensor, spec: QSpec) -> Tensor:
    """Return codes [N, K] as [T, 16, K padded]."""
    N, K = spec.shape
    fmt = spec.format
    assert fmt is not None
    tiles = -(-N // TILE_ROWS)
    missing = (0, padded_inputs(K, fmt.bits) - K, 0, tiles * TILE_ROWS - N)
    if any(missing):
        codes = torch.nn.functional.pad(codes, missing)
    if spec.axis == 1:
        return codes.reshape(tiles, TILE_ROWS, -1)
    size = spec.grouping.length
    # Output feature n = r + R * (16 j + i): all rows of a tile share r, and with it scale and zero.
    by_member = codes.reshape(size // TILE_ROWS, TILE_ROWS, N // size, -1)
    return by_member.permute(2, 0, 1, 3).reshape(tiles, TILE_ROWS, -1)


def _matrix(tiles: Tensor, spec: QSpec) -> Tensor:
    """Undo `_row_tiles`, padding included."""
    if spec.axis == 1:
        return tiles.reshape(-1, tiles.shape[-1])
    size, N = spec.grouping.length, spec.shape[0]
    by_member = tiles.reshape(N // size, size // TILE_ROWS, TILE_ROWS, -1)
    return by_member.permute(1, 2, 0, 3).reshape(N, -1)


def _rows(spec: QSpec, exponent: int) -> Tensor:
    N = spec.shape[0]
    tile = torch.arange(-(-N // TILE_ROWS), dtype=torch.int32)
    if spec.axis == 1:
        base, stride = tile * TILE_ROWS, torch.ones_like(tile)
        count = (N - base).clamp(max=TILE_ROWS)
    else:
        members = spec.grouping.length // TILE_ROWS
        R = N // spec.grouping.length
        base = tile // members + R * TILE_ROWS * (tile % members)
        stride, count = torch.full_like(tile, R), torch.full_like(tile, TILE_ROWS)
    return torch.stack([base, stride, count, torch.full_like(tile, exponent)], dim=1)


def _meta_axis_1(scale: Tensor, zero: Tensor, spec: QSpec) -> Tensor:
    N, K = spec.shape
    fmt = spec.format
    assert fmt is not None
    size = spec.grouping.length
    groups = K // size
    kept = groups if groups == 1 else -(-padded_inputs(K, fmt.bits) // size)
    tiles = -(-N // TILE_ROWS)
    both = torch.stack([scale.reshape(N, groups), zero.reshape(N, groups)], dim=-1)
    both = torch.nn.functional.pad(both, (0, 0, 0, kept - groups, 0, tiles * TILE_ROWS - N))
    # [T, row + 8, g, groups, 2] -> [T, groups, g, row + 8, 2]
    return both.reshape(tiles, 2, 8, kept, 2).permute(0, 3, 2, 1, 4).reshape(tiles, kept, 8, 4).contiguous()


def _meta_axis_0(scale: Tensor, zero: Tensor, spec: QSpec, exponent: int) -> Tensor:
    N, K = spec.shape
    fmt = spec.format
    assert fmt is not None
    R, padded = N // spec.grouping.length, padded_inputs(K, fmt.bits)
    # A power of two: exact, also for what was subnormal.
    scale = torch.ldexp(scale, torch.tensor(exponent, device=scale.device)).to(scale.dtype)
    both = torch.stack([scale.reshape(R, K), zero.reshape(R, K)], dim=1)
    both = torch.nn.functional.pad(both, (0, padded - K))
    return both.reshape(R, 2, padded // BLOCK_INPUTS, BLOCK_INPUTS).transpose(1, 2).contiguous()


def _exponent(scale: Tensor) -> int:
    """Return the power of two that brings the largest float16 scale to about 1, so that x * scale keeps its digits."""
    if scale.dtype != torch.float16:
        return 0
    largest = float(scale.abs().max())
    if not math.isfinite(largest) or largest == 0:
        return 0
    return max(0, -math.frexp(largest)[1])
