"""torch's own products with int4 and int8 weights on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from hqq.backends.cpu_int4 import int4_linear, pack_codes, unpack_codes
from hqq.backends.int4 import Int4Weight, why_not_int4
from hqq.backends.int8_grouped import int8_grouped_linear
from hqq.core.bitpack import pack
from hqq.core.prepared import PreparedWeight, plain
from hqq.core.qtensor import QSpec, QTensor

_SMALLEST_ROWS = 16


class CPUInt4Weight(Int4Weight):
    """A weight for torch's int4 product on the CPU."""

    backend = "cpu"

    def pack_codes(self, codes: Tensor) -> Tensor:
        return pack_codes(codes)

    def unpack_codes(self) -> Tensor:
        codes: Tensor = unpack_codes(self.packed, *self.spec.shape)
        return codes

    def product(self, x: Tensor) -> Tensor:
        y: Tensor = int4_linear(x, self.packed, self.s_and_z, self.spec.shape[0])
        return y


class CPUInt8Weight(PreparedWeight):
    """Codes of 8, 6 or 5 bits for `aten::_weight_int8pack_mm`, which takes W as c * scale: c = q - half, and a term
    (half - zero) * scale * Σ x for each group, in float32, makes up for the difference."""

    backend = "cpu"

    def __init__(self, q: QTensor, dtype: torch.dtype) -> None:
        super().__init__(q, dtype, keep=("zero",))
        flat = plain(q, dtype)
        N, K = q.spec.shape
        size = q.spec.grouping.length
        G = K // size
        assert isinstance(flat.scale, Tensor) and isinstance(flat.zero, Tensor)
        scale, zero = (stat.reshape(N, G).t().contiguous() for stat in (flat.scale, flat.zero))
        self.middle = (q.spec.max_code + 1) // 2
        codes = flat.codes(torch.uint8).reshape(N, G, size).transpose(0, 1)
        self.register_buffer(
            "signed", (codes.to(torch.int16) - self.middle).to(torch.int8).contiguous(), False
        )
        self.register_buffer("group_scale", scale, persistent=False)
        self.register_buffer("offset", (self.middle - zero.float()) * scale.float(), persistent=False)

    signed: Tensor
    group_scale: Tensor
    offset: Tensor

    def codes_and_stats(self) -> tuple[Tensor, Tensor | QTensor, Tensor | QTensor]:
        fmt, grouping = self.spec.format, self.spec.grouping
        assert fmt is not None
        codes = (self.signed.to(torch.int16) + self.middle).to(torch.uint8).transpose(0, 1)
        W_q = pack(codes.reshape(grouping.matrix_shape), fmt)
        scale = self.group_scale.t().reshape(grouping.stat_shape).contiguous()
        zero = self.nested("zero") or self._buffers["zero"]
        assert zero is not None
        return W_q, self.nested("scale") or scale, zero

    def multiply(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y: Tensor = int8_grouped_linear(rows, self.signed, self.group_scale, self.offset)
        return y.reshape(*x.shape[:-1], self.spec.shape[0])


class CPUBackend:
    """bfloat16 and axis 1: torch computes these products quickly in no other dtype."""

    name = "cpu"

    def available(self) -> str | None:
        missing = [name for name in _NEEDED if not hasattr(torch, name)]
        return (
            f"torch {torch.__version__} has no {', '.join(missing)}; install torch>=2.6" if missing else None
        )

    def supports(self, spec: QSpec, compute_dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"the weight is on {device}, and torch's products for the CPU take CPU tensors"
        if spec.max_code <= 15:
            return why_not_int4(spec, compute_dtype, _SMALLEST_ROWS, 2)
        return _why_not_int8(spec, compute_dtype)

    def prepare(self, q: QTensor, dtype: torch.dtype) -> PreparedWeight:
        return CPUInt4Weight(q, dtype) if q.spec.max_code <= 15 else CPUInt8Weight(q, dtype)


_NEEDED = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu", "_weight_int8pack_mm")


def _why_not_int8(spec: QSpec, dtype: torch.dtype) -> str | None:
    kernel = "torch's int8 product"
    if len(spec.shape) != 2 or spec.packing is None:
        return f"{kernel} takes matrices of packed codes"
    if spec.axis != 1 or not spec.channel_wise:
        return f"{kernel} takes groups along axis=1"
    if dtype != torch.bfloat16:
        return f"{kernel} is used in bfloat16, not in {dtype}"
    K, size = spec.shape[1], spec.grouping.length
    if K % size or size % 32:
        return f"{kernel} takes groups of a multiple of 32 that divide the {K} inputs, not of {size}"
    return None


MATMUL = CPUBackend()
