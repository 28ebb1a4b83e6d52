"""Launching the solver kernels: from a checked weight to packed codes, scale and zero, all on the device."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqq.core.bitpack import PackFormat
from hqq.core.qtensor import QSpec
from hqq.core.solvers import als_search, als_storage
from hqq.core.solvers.half_quadratic import BETA, ITERATIONS, LP_NORM
from hqq.kernels.availability import interpreting
from hqq.kernels.dequant_view import view_of
from hqq.kernels.device import on
from hqq.kernels.solve_als_kernel import als_kernel
from hqq.kernels.solve_config import Blocks
from hqq.kernels.solve_encode_kernel import encode_kernel
from hqq.kernels.solve_hqq_kernel import iterate_kernel, pick_kernel, total_kernel
from hqq.kernels.solve_min_max_kernel import min_max_kernel

_TL = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_INT32_LIMIT = 1 << 31
# Residuals x with |x|^(2-p) <= 1/beta shrink to nothing; the factor leaves room for rounding.
_LARGEST_UNSHRUNK = 0.999 * BETA ** (-1.0 / (2.0 - LP_NORM))
_PICK_BLOCK = 1024
_TOTAL_CHUNK = 1024
_ENCODE_BLOCK, _ENCODE_WARPS = 1024, 4


def new_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor that the kernels fill; every element of it is written."""
    return torch.empty(shape, dtype=dtype, device=device)


class Lattices:
    """What the solver kernels write for each group: scale, zero and inverse scale, float32 [G], and flags."""

    def __init__(self, groups: int, blocks: Blocks, device: torch.device) -> None:
        self.scale, self.zero, self.inverse = (new_buffer((groups,), torch.float32, device) for _ in range(3))
        self.programs = -(-groups // blocks.block)
        self.finite = new_buffer((self.programs,), torch.int32, device)


def solve_als(W: Tensor, spec: QSpec, storage_dtype: torch.dtype, blocks: Blocks) -> Lattices:
    """Run the ALS solver on `W` (contiguous) without synchronising."""
    grouping = spec.grouping
    groups, length = grouping.num_groups, grouping.length
    found = Lattices(groups, blocks, W.device)
    with on(W.device):
        als_kernel[(found.programs,)](
            W,
            start_table(spec.max_code, length, W.device),
            found.scale,
            found.zero,
            found.inverse,
            found.finite,
            groups,
            0,
            0,
            BLOCK=blocks.block,
            C=blocks.chunk,
            T=blocks.tiles,
            GS=length,
            AXIS=grouping.axis,
            MAX_CODE=spec.max_code,
            STORAGE=_TL[storage_dtype],
            SCALES=als_search.SCALES,
            OFFSETS=len(als_search.OFFSETS),
            FITS_PER_OFFSET=als_search.FITS_PER_OFFSET,
            FITS_OF_BEST=als_search.FITS_OF_BEST,
            OVERSHOOT=als_search.OVERSHOOT,
            ZERO_FITS=als_storage.ZERO_FITS,
            EXTENT=als_storage.EXTENT,
            WIDE=_wide(W),
            SATURATE=_saturates(W.device),
            INTERPRETED=interpreting(),
            num_warps=blocks.warps,
            **_options(),
            **_register_limit(W.device, grouping.axis, blocks),
        )
    return found


@cache
def start_table(max_code: int, length: int, device: torch.device) -> Tensor:
    """Return 1/s, -1/s, b and reach of every start, float32 [offsets, scales, 4] on `device`."""
    rows = [
        [(1 / start.s, -1 / start.s, start.b, start.reach) for start in of_offset]
        for of_offset in als_search.start_lattices(max_code, length)
    ]
    return torch.tensor(rows, dtype=torch.float32).to(device)


def solve_half_quadratic(
    W: Tensor, spec: QSpec, storage_dtype: torch.dtype, blocks: Blocks, *, round_zero: bool
) -> Lattices:
    """Run the half-quadratic solver on `W` (contiguous) without synchronising."""
    grouping = spec.grouping
    groups = grouping.num_groups
    found = Lattices(groups, blocks, W.device)
    history = new_buffer((ITERATIONS, groups), torch.float32, W.device)
    errors = new_buffer((ITERATIONS, found.programs), torch.float32, W.device)
    totals = new_buffer((ITERATIONS,), torch.float64, W.device)
    with on(W.device):
        iterate_kernel[(found.programs,)](
            W,
            found.scale,
            found.inverse,
            history,
            errors,
            found.finite,
            groups,
            0,
            BLOCK=blocks.block,
            C=blocks.chunk,
            T=blocks.tiles,
            GS=grouping.length,
            AXIS=grouping.axis,
            MAX_CODE=spec.max_code,
            STORAGE=_TL[storage_dtype],
            ROUND_ZERO=round_zero,
            ITERATIONS=ITERATIONS,
            LP_NORM=LP_NORM,
            BETA=BETA,
            LARGEST_UNSHRUNK=_LARGEST_UNSHRUNK,
            WIDE=_wide(W),
            num_warps=blocks.warps,
            **_options(),
        )
        total_kernel[(ITERATIONS,)](errors, totals, found.programs, CHUNK=_TOTAL_CHUNK, num_warps=4)
        pick_kernel[(triton.cdiv(groups, _PICK_BLOCK),)](
            history,
            totals,
            found.zero,
            groups,
            float(W.numel()),
            ITERATIONS=ITERATIONS,
            PADDED=triton.next_power_of_2(ITERATIONS),
            BLOCK=_PICK_BLOCK,
            WIDE=history.numel() >= _INT32_LIMIT,
            num_warps=4,
        )
    return found


def solve_min_max(
    W: Tensor, spec: QSpec, storage_dtype: torch.dtype, blocks: Blocks, *, round_zero: bool
) -> Lattices:
    """Find the min-max lattices of `W` (contiguous) without synchronising."""
    grouping = spec.grouping
    found = Lattices(grouping.num_groups, blocks, W.device)
    with on(W.device):
        min_max_kernel[(found.programs,)](
            W,
            found.scale,
            found.zero,
            found.inverse,
            found.finite,
            grouping.num_groups,
            0,
            BLOCK=blocks.block,
            C=blocks.chunk,
            T=blocks.tiles,
            GS=grouping.length,
            AXIS=grouping.axis,
            MAX_CODE=spec.max_code,
            STORAGE=_TL[storage_dtype],
            ROUND_ZERO=round_zero,
            WIDE=_wide(W),
            num_warps=blocks.warps,
            **_options(),
        )
    return found


def encode(W: Tensor, found: Lattices, spec: QSpec, fmt: PackFormat) -> Tensor:
    """Return the packed codes of `W` (contiguous) on the lattices `found`."""
    W_q = new_buffer(spec.packed_shape, fmt.dtype, W.device)
    view = view_of(spec.grouping, fmt, _ENCODE_BLOCK)
    tile_columns = min(_ENCODE_BLOCK, triton.next_power_of_2(view.columns))
    tile_rows = _ENCODE_BLOCK // tile_columns
    row_blocks, column_blocks = (
        triton.cdiv(view.packed_rows, tile_rows),
        triton.cdiv(view.columns, tile_columns),
    )
    reach = (row_blocks + 1) * tile_rows + (fmt.fields - 1) * view.packed_rows
    with on(W.device):
        encode_kernel[(row_blocks * column_blocks,)](
            W,
            W_q,
            found.inverse,
            found.zero,
            view.rows,
            view.packed_rows,
            view.packed_groups,
            view.columns,
            BITS=fmt.bits,
            FIELDS=fmt.fields,
            MAX_CODE=spec.max_code,
            GROUPS=view.groups,
            SPLIT=view.split,
            TILE_ROWS=tile_rows,
            TILE_COLUMNS=tile_columns,
            WIDE=reach * view.columns + tile_columns >= _INT32_LIMIT,
            num_warps=_ENCODE_WARPS,
            **_options(),
        )
    return W_q


def _wide(W: Tensor) -> bool:
    return W.numel() >= _INT32_LIMIT


def _register_limit(device: torch.device, axis: int, blocks: Blocks) -> dict[str, Any]:
    # On axis 0 the compiler would spend 255 registers on what fits 168 without a spill, with which three programs run
    # side by side in place of two.
    return {"maxnreg": 168} if _saturates(device) and axis == 0 and blocks.warps == 4 else {}


@cache
def _saturates(device: torch.device) -> bool:
    """Whether `device` is NVIDIA's, and runs the PTX instruction of `quick_codes`."""
    return device.type == "cuda" and torch.version.cuda is not None


def _options() -> dict[str, Any]:
    # The reference rounds products before it adds; where one rounding is as good, the kernels say fma.
    return {} if interpreting() else {"enable_fp_fusion": False}
