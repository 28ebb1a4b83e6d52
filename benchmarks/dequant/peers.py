"""Other ways to dequantise, each as a function of a buffer set: what the kernel is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.dequant.seed_kernel import dequantize_adjacent_rows, pack_adjacent_rows
from hqq.core.qtensor import QTensor

_SEED_BLOCKS = (256, 512, 1024)


def unpack_eagerly(q: QTensor) -> Tensor:
    """`(W_q - zero) * scale` as the original 0.2.8 does it: fields written one by one into an empty matrix."""
    fmt = q.spec.format
    assert fmt is not None
    assert isinstance(q.scale, Tensor) and isinstance(q.zero, Tensor)
    packed_rows = q.W_q.shape[0]
    codes = torch.empty(
        (fmt.fields * packed_rows, *q.W_q.shape[1:]), dtype=q.scale.dtype, device=q.W_q.device
    )
    for i, shift in enumerate(fmt.shifts):
        codes[i * packed_rows : (i + 1) * packed_rows] = (q.W_q >> shift) & fmt.mask
    codes = codes[: q.spec.grouping.rows]
    return ((codes - q.zero) * q.scale).reshape(q.spec.shape)


def compiled() -> Callable[[QTensor], Tensor]:
    """Return the same formula through torch.compile."""
    function = torch.compile(
        lambda W_q, scale, zero, spec: unpack_eagerly(QTensor(W_q, scale, zero, spec)),
        dynamic=False,
        fullgraph=True,
    )

    def run(q: QTensor) -> Tensor:
        result: Tensor = function(q.W_q, q.scale, q.zero, q.spec)
        return result

    return run


@dataclass(frozen=True)
class AdjacentRows:
    """A weight in the packing of the re-created stand-alone kernel."""

    W_q: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    shape: tuple[int, int]
    gs: int
    axis: int


def in_adjacent_rows(q: QTensor) -> AdjacentRows | None:
    """Return `q` repacked for the re-created kernel, or None for what that kernel does not take."""
    spec = q.spec
    if spec.nbits not in (8, 4) or spec.group_size is None or len(spec.shape) != 2:
        return None
    assert isinstance(q.scale, Tensor) and isinstance(q.zero, Tensor)
    bits, (N, K) = int(spec.nbits), spec.shape
    codes = spec.grouping.ungroup(q.codes())
    return AdjacentRows(
        pack_adjacent_rows(codes, bits), q.scale, q.zero, bits, (N, K), spec.group_size, spec.axis
    )


def seed_kernels() -> dict[int, Callable[[AdjacentRows], Tensor]]:
    """Return the re-created kernel by block size."""

    def with_block(block: int) -> Callable[[AdjacentRows], Tensor]:
        return lambda w: dequantize_adjacent_rows(
            w.W_q, w.scale, w.zero, w.bits, w.shape, w.gs, w.axis, block
        )

    return {block: with_block(block) for block in _SEED_BLOCKS}
