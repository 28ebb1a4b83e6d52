"""Launching the dequantisation kernel: from checked tensors to the kernel's arguments."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqq.core.qtensor import QSpec
from hqq.kernels.availability import interpreting
from hqq.kernels.dequant_asm import FieldAsm, field_asm
from hqq.kernels.dequant_config import Config
from hqq.kernels.dequant_flow import GDC_WAIT
from hqq.kernels.dequant_kernel import dequantize_kernel, signature_of
from hqq.kernels.dequant_plan import Stat
from hqq.kernels.dequant_start import start_triton
from hqq.kernels.dequant_view import MatrixView, view_of
from hqq.kernels.device import on

_TL = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_ASM_NAME = {torch.float16: "f16", torch.bfloat16: "bf16"}
_NO_ASM = FieldAsm((), "", 1)
_INT32_LIMIT = 1 << 31
# Shared memory in bytes: what CUDA adds to a block's own, and in what units it is given.
_SYSTEM_SHARED, _SHARED_UNIT = 1024, 128


def new_output(spec: QSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the tensor that the kernel fills; every element of it is written."""
    return torch.empty(spec.shape, dtype=dtype, device=device)


def launch(
    W_q: Tensor,
    scale: Stat,
    zero: Stat,
    spec: QSpec,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    config: Config,
    *,
    asm: bool = True,
) -> Tensor:
    """Return the dequantised tensor of spec.shape; the arguments are checked ones (see `check_call`).

    Runs on W_q's device and that device's current stream, without synchronising. `asm` is for measurements.
    """
    fmt = spec.format
    assert fmt is not None
    if W_q.dtype != fmt.dtype:
        W_q = W_q.view(fmt.dtype)
    scale, zero = scale.contiguous(), zero.contiguous()
    out = new_output(spec, out_dtype, W_q.device)
    scale_dtype = scale.values.dtype if scale.scale is None else dtype
    zero_dtype = zero.values.dtype if zero.scale is None else dtype
    difference = torch.promote_types(dtype, zero_dtype)
    product = torch.promote_types(difference, scale_dtype)
    ptx = _NO_ASM
    one_dtype = {difference, product, scale_dtype, zero_dtype} == {out_dtype}
    if asm and one_dtype and out_dtype in _ASM_NAME and _has_packed_floats(W_q.device):
        ptx = field_asm(_ASM_NAME[out_dtype], fmt.bits, fmt.fields)
    view = view_of(spec.grouping, fmt, config.block)
    tile_columns = min(config.block, triton.next_power_of_2(view.columns))
    tile_rows = config.block // tile_columns
    row_blocks = triton.cdiv(view.packed_rows, tile_rows * config.steps)
    column_blocks = triton.cdiv(view.columns, tile_columns)
    by_columns = view.groups == "columns"
    # Tiles that hold several whole rows do not lie one behind the other as prefetching takes it for granted.
    ahead = _has_bulk_prefetch(W_q.device) and not (by_columns and tile_rows > 1)
    overlap = config.overlap if _has_overlap(W_q.device) else 0
    if not ahead:
        overlap = min(overlap, 2)
    span = _span(view, tile_rows, tile_columns)
    stat_asm = None
    if ptx.texts and by_columns:
        stat_asm = field_asm(_ASM_NAME[out_dtype], 8, 1).texts[0]
    striped = by_columns and 0 < config.stripe < column_blocks
    # Tiles reach further than the matrix.
    reach = row_blocks * config.steps * tile_rows + (fmt.fields - 1) * view.packed_rows
    with on(W_q.device):
        if W_q.device.type == "cuda":
            _start(scale.scale is None, zero.scale is None)
        dequantize_kernel[(row_blocks * column_blocks,)](
            W_q,
            out,
            scale.values,
            zero.values,
            scale.scale,
            scale.zero,
            zero.scale,
            zero.zero,
            view.rows,
            view.packed_rows,
            view.packed_groups,
            view.columns,
            scale.period,
            zero.period,
            config.stripe,
            config.distance,
            BITS=fmt.bits,
            FIELDS=fmt.fields,
            GROUPS=view.groups,
            SPLIT=view.split,
            TILE_ROWS=tile_rows,
            TILE_COLUMNS=tile_columns,
            STEPS=config.steps,
            STRIPED=striped,
            BURST=config.burst if ahead else 0,
            PHASE=config.phase or config.burst,
            OVERLAP=overlap,
            RESERVE=_reserve(config.resident, W_q.device) if config.resident and ahead else None,
            SCALE_MODE=_mode(scale, span),
            ZERO_MODE=_mode(zero, span),
            SPAN=span,
            STAT=_TL[dtype],
            STAT_ASM=stat_asm,
            DIFFERENCE=_TL[difference],
            PRODUCT=_TL[product],
            OUT=_TL[out_dtype],
            WIDE=reach * view.columns + tile_columns >= _INT32_LIMIT,
            ASM=ptx.texts or None,
            CONSTRAINTS=ptx.constraints,
            PACK=ptx.pack,
            LOAD_POLICY="evict_first" if config.streaming else "",
            STAT_POLICY="evict_last" if config.streaming and by_columns else "",
            STORE_HINT=".cs" if config.streaming else "",
            THREADS=32 * config.warps,
            INTERPRETED=interpreting(),
            num_warps=config.warps,
            **_compiler_options(),
            **({"launch_pdl": True} if overlap else {}),
        )
    return out


@cache
def _reserve(resident: int, device: torch.device) -> str:
    """Return PTX that takes as much shared memory as leaves room for `resident` programs and no more."""
    room = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    size = room // (resident + 1) - _SYSTEM_SHARED + _SHARED_UNIT
    size -= size % _SHARED_UNIT
    # The store keeps the compiler from leaving out what nothing reads.
    return f"{{ .shared .align 16 .b32 reserved[{size // 4}]; st.volatile.shared.u32 [reserved], $1; mov.u32 $0, 0; }}"


@cache
def _start(plain_scale: bool, plain_zero: bool) -> None:
    absent = ["scale_scale", "scale_zero"] * plain_scale + ["zero_scale", "zero_zero"] * plain_zero
    start_triton(dequantize_kernel, signature_of(absent))


def matrix_view(spec: QSpec, config: Config) -> MatrixView:
    """Return the matrix that the kernel sees for `spec` with the tiles of `config`."""
    assert spec.format is not None
    return view_of(spec.grouping, spec.format, config.block)


def _span(view: MatrixView, tile_rows: int, tile_columns: int) -> int:
    """Return how many groups a tile has one after the other, the first one a multiple of that; 0 if there is none."""
    if view.groups == "columns":
        return tile_columns
    return tile_rows if view.split == 1 and view.packed_groups % tile_rows == 0 else 0


def _mode(stat: Stat, span: int) -> str:
    return "runs" if stat.mode == "columns" and span and stat.period % span == 0 else stat.mode


@cache
def _has_packed_floats(device: torch.device) -> bool:
    """Whether the PTX of `field_asm` runs: NVIDIA, compute capability 8.0 or later, not interpreted."""
    # Triton 3.3 cannot pick a text out of a constant tuple.
    if device.type != "cuda" or torch.version.cuda is None or not hasattr(tl.constexpr, "__getitem__"):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _has_bulk_prefetch(device: torch.device) -> bool:
    """Whether the instructions of compute capability 9.0 run: NVIDIA, not interpreted."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


@cache
def _has_overlap(device: torch.device) -> bool:
    """Whether kernels can start before the previous one ends, in this Triton too."""
    return _has_bulk_prefetch(device) and GDC_WAIT is not None


def _compiler_options() -> dict[str, bool]:
    # The difference is rounded before it is multiplied; saying so also keeps newer Triton from warning. Checks of
    # integers for overflow are only kept in debug mode, but building them costs older Triton a fifth of its front end.
    return {} if interpreting() else {"enable_fp_fusion": False, "sanitize_overflow": False}
