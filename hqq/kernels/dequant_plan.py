"""What one call of the dequantisation kernel is about: its description, checked against the tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hqq.core.qtensor import QSpec, QTensor, check_packed
from hqq.errors import ConfigError, DtypeError, ShapeError

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Stat:
    """Scale or zero: values, or 8-bit codes with a scale and zero of their own, grouped along `axis`."""

    values: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    axis: int = 0

    @property
    def mode(self) -> str:
        """Which scale and zero a code has; the kernel's names."""
        if self.scale is None:
            return "plain"
        if self.scale.numel() == 1:
            return "one"
        return "columns" if self.axis == 0 else "rows"

    @property
    def period(self) -> int:
        """Outer groups for mode "columns", group length for mode "rows"."""
        if self.scale is None:
            return 0
        return self.scale.numel() if self.mode == "columns" else self.values.numel() // self.scale.numel()

    def contiguous(self) -> Stat:
        """Return the same values with every tensor contiguous (they are small beside the codes)."""
        scale = None if self.scale is None else self.scale.contiguous()
        zero = None if self.zero is None else self.zero.contiguous()
        return Stat(self.values.contiguous(), scale, zero, self.axis)

    def reference(self, shape: tuple[int, ...]) -> Tensor | QTensor:
        """Return it as the torch reference takes it; `shape` is the stat shape of the weight's grouping."""
        if self.scale is None or self.zero is None:
            return self.values.reshape(shape)
        one = self.scale.numel() == 1
        length = None if one else self.values.numel() // self.scale.numel()
        spec = QSpec(8, shape, length, self.axis, "8bit_u8", channel_wise=not one)
        outer = spec.grouping.stat_shape
        codes = self.values.reshape(spec.grouping.matrix_shape)
        return QTensor(codes, self.scale.reshape(outer), self.zero.reshape(outer), spec)


def inline_stat(stat: Tensor | QTensor, dtype: torch.dtype) -> Stat:
    """Return `stat` as the kernel takes it; what it cannot dequantise on the fly is dequantised here, to `dtype`.

    On the fly go codes of 8, 6 or 5 bits with float scale and zero of `dtype`, as every configuration of HQQLinear
    gives them. Anything else costs one launch more.
    """
    if isinstance(stat, Tensor):
        return Stat(stat)
    scale, zero, spec = stat.scale, stat.zero, stat.spec
    if spec.packing == "8bit_u8" and stat.W_q.dtype == torch.uint8 and isinstance(scale, Tensor):
        grouping = spec.grouping
        if (
            isinstance(zero, Tensor)
            and scale.dtype == zero.dtype == dtype
            and scale.numel() == grouping.num_groups
        ):
            # A whole-channel statistic along axis 0 is a matrix like [G, 1] whose only group is its column.
            return Stat(stat.W_q, scale, zero, spec.axis)
    return Stat(stat.dequantize(dtype))


@cache
def spec_of(
    nbits: float, shape: tuple[int, ...], group_size: int | None, axis: int, channel_wise: bool, packing: str
) -> QSpec:
    """Return the description, made once for each layer shape; raises ConfigError or ShapeError."""
    return QSpec(nbits, shape, group_size, axis, packing, channel_wise=channel_wise)


def check_call(W_q: Tensor, scale: Stat, zero: Stat, spec: QSpec, *dtypes: torch.dtype) -> None:
    """Raise DtypeError, ShapeError or ConfigError unless the kernel may read these tensors as `spec` says."""
    check_packed(W_q, spec)
    if not W_q.is_contiguous():
        raise ShapeError(
            f"got W_q of shape {tuple(W_q.shape)} with strides {W_q.stride()}; call .contiguous() first"
        )
    for dtype in dtypes:
        if dtype not in KERNEL_DTYPES:
            raise DtypeError(
                f"got {dtype} for the dequantisation kernel; expected float16, bfloat16 or float32"
            )
    for name, stat in (("scale", scale), ("zero", zero)):
        _check_stat(name, stat, spec, W_q.device)


def _check_stat(name: str, stat: Stat, spec: QSpec, device: torch.device) -> None:
    if stat.values.numel() != spec.grouping.num_groups:
        raise ShapeError(
            f"got {stat.values.numel()} values of {name}; expected {spec.grouping.num_groups}, one for each group of "
            f"shape={spec.shape}, group_size={spec.group_size}, axis={spec.axis}"
        )
    if (stat.scale is None) != (stat.zero is None):
        raise ConfigError(f"got a quantised {name} without its own scale or zero; expected both or neither")
    if stat.scale is not None and stat.zero is not None:
        if stat.values.dtype != torch.uint8:
            raise DtypeError(f"got codes of {name} as {stat.values.dtype}; expected uint8")
        groups = stat.scale.numel()
        if stat.zero.numel() != groups or groups < 1 or stat.values.numel() % groups:
            raise ShapeError(
                f"got {groups} scales and {stat.zero.numel()} zeros for {stat.values.numel()} codes of {name}; "
                "expected one of each for every group of codes"
            )
    floats = [stat.values] if stat.scale is None or stat.zero is None else [stat.scale, stat.zero]
    for tensor in floats:
        if tensor.dtype not in KERNEL_DTYPES:
            raise DtypeError(f"got {name} of {tensor.dtype}; expected float16, bfloat16 or float32")
    for tensor in (stat.values, *floats):
        if tensor.device != device:
            raise ConfigError(
                f"got {name} on {tensor.device} and W_q on {device}; expected one device for both"
            )
