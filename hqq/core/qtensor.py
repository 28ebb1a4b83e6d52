"""A quantised tensor: packed codes, scale and zero, and the description that gives them meaning.

`dequantize` is the definition of the format that every kernel must agree with: `(W_q - zero) * scale`, both steps
rounded to the compute dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hqq.core.bitpack import FORMATS, PackFormat, check_nbits, format_named, max_code, unpack
from hqq.core.grouping import Grouping
from hqq.errors import ConfigError, DtypeError, ShapeError


@dataclass(frozen=True)
class QSpec:
    """What the tensors of a quantised tensor mean.

    Args:
        nbits: bits per code: 8, 6, 5, 4, 3, 2, 1.58 or 1.
        shape: shape of the tensor that was quantised.
        group_size: elements per group; None for whole channels.
        axis: 1 if groups are rows of the grouped matrix, 0 if columns (see `Grouping`).
        packing: name of the pack format; None if codes are stored one per element in a float dtype.
        view_as_float: packed codes are stored under a float dtype of the same bytes.
        channel_wise: False if the whole tensor is one group.
    """

    nbits: float
    shape: tuple[int, ...]
    group_size: int | None = 64
    axis: int = 1
    packing: str | None = "4bit_u8"
    view_as_float: bool = False
    channel_wise: bool = True
    grouping: Grouping = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbits", check_nbits(self.nbits))
        if self.packing is not None:
            fmt = format_named(self.packing)
            if self.max_code > fmt.mask:
                raise ConfigError(
                    f"got nbits={self.nbits} with packing={self.packing!r}, which holds {fmt.bits} bits"
                )
        object.__setattr__(self, "shape", tuple(int(s) for s in self.shape))
        grouping = Grouping(self.shape, self.group_size, self.axis, per_tensor=not self.channel_wise)
        object.__setattr__(self, "grouping", grouping)

    @property
    def format(self) -> PackFormat | None:
        """The pack format, or None if codes are not packed."""
        return FORMATS[self.packing] if self.packing is not None else None

    @property
    def max_code(self) -> int:
        """Largest code."""
        return max_code(self.nbits)

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Shape of the packed codes before any view as float."""
        matrix = self.grouping.matrix_shape
        if self.format is None or not matrix:
            return matrix
        return (self.format.packed_rows(matrix[0]), *matrix[1:])


@dataclass
class QTensor:
    """Packed codes with scale and zero, each of those a float tensor or itself quantised.

    `W_q` has `spec.packed_shape` (last dimension divided by the byte ratio under view_as_float); scale and zero have
    `spec.grouping.stat_shape`.
    """

    W_q: Tensor
    scale: Tensor | QTensor
    zero: Tensor | QTensor
    spec: QSpec

    def codes(self, dtype: torch.dtype = torch.uint8) -> Tensor:
        """Return the codes as the grouped matrix, in `dtype`."""
        return unpack_codes(self.W_q, self.spec, dtype)

    def dequantize(self, compute_dtype: torch.dtype | None = None) -> Tensor:
        """Return the tensor that the codes stand for, of `spec.shape`, in `compute_dtype` (default: scale's)."""
        if compute_dtype is None:
            compute_dtype = _float_dtype(self.scale)
        scale = self.scale.dequantize(compute_dtype) if isinstance(self.scale, QTensor) else self.scale
        zero = self.zero.dequantize(compute_dtype) if isinstance(self.zero, QTensor) else self.zero
        return dequantize(self.W_q, scale, zero, self.spec, compute_dtype)

    def check(self) -> QTensor:
        """Return self if every tensor has the shape and dtype its spec says; else raise ShapeError or DtypeError."""
        check_packed(self.W_q, self.spec)
        for name in ("scale", "zero"):
            stat = getattr(self, name)
            if isinstance(stat, QTensor):
                stat.check()
                shape = stat.spec.shape
            else:
                shape = tuple(stat.shape)
                if not stat.dtype.is_floating_point:
                    raise DtypeError(f"got {name} of {stat.dtype}; expected a float dtype")
            expected = self.spec.grouping.stat_shape
            # One value for all groups broadcasts whatever its dimensions.
            if shape != expected and not math.prod(shape) == math.prod(expected) == 1:
                raise ShapeError(
                    f"got {name} of shape {shape}; expected {expected}, one value for each group of "
                    f"shape={tuple(self.spec.shape)}, group_size={self.spec.group_size}, axis={self.spec.axis}"
                )
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scale and zero together."""
        return self.W_q.nbytes + self.scale.nbytes + self.zero.nbytes

    @property
    def device(self) -> torch.device:
        """Device of the codes."""
        return self.W_q.device

    def to(self, device: torch.device) -> QTensor:
        """Return a copy of the description with every tensor on `device`."""
        return replace(self, W_q=self.W_q.to(device), scale=self.scale.to(device), zero=self.zero.to(device))


def _float_dtype(stat: Tensor | QTensor) -> torch.dtype:
    return stat.dtype if isinstance(stat, Tensor) else _float_dtype(stat.scale)


def unpack_codes(W_q: Tensor, spec: QSpec, dtype: torch.dtype) -> Tensor:
    """Return the codes of `W_q` as the grouped matrix of `spec`, in `dtype`."""
    fmt = spec.format
    if fmt is None:
        return W_q.to(dtype).reshape(spec.grouping.matrix_shape)
    if W_q.dtype != fmt.dtype:
        W_q = W_q.view(fmt.dtype)
    return unpack(W_q, fmt, rows=spec.grouping.rows if spec.grouping.matrix_shape else None, dtype=dtype)


def dequantize(W_q: Tensor, scale: Tensor, zero: Tensor, spec: QSpec, compute_dtype: torch.dtype) -> Tensor:
    """Return `(W_q - zero) * scale` of `spec.shape`.

    The difference and the product are each rounded to the dtype that codes (in `compute_dtype`) and zero or scale
    promote to, as the original's eager code does.
    """
    codes = unpack_codes(W_q, spec, compute_dtype)
    return spec.grouping.ungroup((codes - zero) * scale)


def check_packed(W_q: Tensor, spec: QSpec) -> None:
    """Raise ShapeError or DtypeError unless `W_q` can be the packed codes of `spec`."""
    fmt = spec.format
    expected = spec.packed_shape
    if fmt is not None and W_q.dtype != fmt.dtype:
        if not W_q.dtype.is_floating_point:
            raise DtypeError(
                f"got W_q of {W_q.dtype}; expected {fmt.dtype} ({fmt.name}), or a float dtype that views it"
            )
        if expected:
            # The view keeps the bytes of a row.
            expected = (*expected[:-1], expected[-1] * fmt.dtype.itemsize // W_q.element_size())
    if tuple(W_q.shape) != expected:
        raise ShapeError(
            f"got W_q of shape {tuple(W_q.shape)} and {W_q.dtype}; expected {expected} for shape={tuple(spec.shape)}, "
            f"nbits={spec.nbits}, group_size={spec.group_size}, axis={spec.axis}"
        )
