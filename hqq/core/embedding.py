"""HQQEmbedding: an embedding table stored as codes, from which only the rows looked up are dequantised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hqq.core.bitpack import PackFormat
from hqq.core.devices import DeviceLike
from hqq.core.linear import HQQLinear
from hqq.core.qtensor import QSpec
from hqq.core.quantized_module import QuantizedModule
from hqq.errors import DtypeError, IdRangeError, ShapeError


def gather_rows(W_q: Tensor, scale: Tensor, zero: Tensor, spec: QSpec, rows: Tensor) -> Tensor:
    """Return rows `rows` [R] (int64) of the quantised matrix of spec.shape [N, K] as [R, K] in scale's dtype."""
    K = spec.shape[1]
    flat = rows.unsqueeze(-1) * K + torch.arange(K, device=rows.device)
    width = spec.grouping.matrix_shape[1]
    row, column = flat // width, flat % width
    fmt = spec.format
    if fmt is None:
        codes = W_q[row, column]
    else:
        codes = _gather_fields(W_q if W_q.dtype == fmt.dtype else W_q.view(fmt.dtype), row, column, fmt)
    if not spec.channel_wise:
        return (codes.to(scale.dtype) - zero) * scale
    group = row if spec.axis == 1 else column
    return (codes.to(scale.dtype) - zero.flatten()[group]) * scale.flatten()[group]


def _gather_fields(W_q: Tensor, row: Tensor, column: Tensor, fmt: PackFormat) -> Tensor:
    packed_rows = W_q.shape[0]
    shifts = torch.tensor(fmt.shifts, device=W_q.device, dtype=torch.int32)[row // packed_rows]
    return (W_q[row % packed_rows, column].to(torch.int32) >> shifts) & fmt.mask


def _check_range(ids: Tensor, rows: int) -> None:
    # Elsewhere than on the CPU the check would wait for the device.
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= rows):
        raise IdRangeError(f"got ids from {int(ids.min())} to {int(ids.max())}; expected 0 to {rows - 1}")


class HQQEmbedding(QuantizedModule):
    """A table [num_embeddings, embedding_dim] of codes; `forward` dequantises the rows that are looked up.

    Built by `from_embedding`, or empty and filled by `load_state_dict`.
    """

    def __init__(
        self,
        num_embeddings: int | None = None,
        embedding_dim: int | None = None,
        padding_idx: int | None = None,
        compute_dtype: torch.dtype = torch.float16,
        device: DeviceLike = None,
    ) -> None:
        super().__init__(compute_dtype, device)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        quant_config: Mapping[str, Any],
        compute_dtype: torch.dtype = torch.float16,
        device: DeviceLike = None,
    ) -> HQQEmbedding:
        """Return the quantised form of `embedding`, which is left as it is.

        Raises what `HQQLinear` raises for its weight.
        """
        linear = HQQLinear.from_weights(embedding.weight, None, quant_config, compute_dtype, device)
        return cls.sharing(linear, embedding.padding_idx)

    @classmethod
    def sharing(cls, linear: HQQLinear, padding_idx: int | None = None) -> HQQEmbedding:
        """Return an embedding over the very tensors of `linear`: the quantised form of tied weights."""
        spec = linear.qtensor().spec
        layer = cls(spec.shape[0], spec.shape[1], padding_idx, linear.compute_dtype, linear.device)
        layer.quant_config, layer.offload_meta = linear.quant_config, linear.offload_meta
        layer.W_q = linear.W_q
        layer._set_spec(spec)
        for name in ("scale", "zero"):
            layer._set_stat(name, getattr(linear, name), linear._quantized_stat(name))
        return layer

    @property
    def _declared_shape(self) -> tuple[int, int] | None:
        if self.num_embeddings is None or self.embedding_dim is None:
            return None
        return (self.num_embeddings, self.embedding_dim)

    def _features_from_shape(self) -> None:
        assert self._spec is not None
        if len(self._spec.shape) != 2:
            raise ShapeError(
                f"got a table of shape {self._spec.shape}; expected [num_embeddings, embedding_dim]"
            )
        self.num_embeddings, self.embedding_dim = self._spec.shape

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of `ids` (integers, any shape) as [*ids.shape, embedding_dim] in the compute dtype.

        Raises DtypeError for ids that are not integers, IdRangeError (on the CPU) for ids outside the table.
        """
        q = self.qtensor()
        if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
            raise DtypeError(f"got ids of {ids.dtype}; expected an integer dtype")
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_range(ids, q.spec.shape[0])
        scale, zero = self._scale_and_zero()
        rows = gather_rows(q.W_q, scale, zero, q.spec, ids.reshape(-1).long())
        return rows.reshape(*ids.shape, q.spec.shape[1])

    def extra_repr(self) -> str:
        shape = self._declared_shape
        return "not quantised" if shape is None else f"{shape[0]}, {shape[1]}, padding_idx={self.padding_idx}"
