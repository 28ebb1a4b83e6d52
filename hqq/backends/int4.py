"""What torch's int4 products, on CUDA and on the CPU, have in common: the form that they give to scale and zero."""

from __future__ import annotations

import torch
from torch import Tensor

from hqq.core.bitpack import pack
from hqq.core.prepared import PreparedWeight, plain
from hqq.core.qtensor import QSpec, QTensor

_GROUP_SIZES = (256, 128, 64, 32)
_MIDDLE = 8
_MUCH = 2.0**-8  # relative to the weight: what bfloat16 itself tells apart


class Int4Weight(PreparedWeight):
    """Codes of at most 4 bits in the arrangement `packed` of torch's int4 products, which take W as (c - 8) s + z.

    c = q + 8 - half, half the middle of the codes, so z = (half - zero) * scale: computed in float32, rounded to
    bfloat16 once, and small, so that W differs from `(q - zero) * scale` by at most 2^-9 |z|. That is much where large
    weights share a group with small ones; so what z is `missing` is kept too, and added with the sums of each group's
    inputs: always, or, if not `always_exact`, where the weight as a whole would differ by more than bfloat16 does.
    scale is kept as s; zero, which cannot be had from z exactly, beside it. Longer groups than torch takes are several
    with the same s.
    """

    always_exact = True

    def __init__(self, q: QTensor, dtype: torch.dtype) -> None:
        super().__init__(q, dtype, keep=("zero",))
        flat = plain(q, dtype)
        N, K = q.spec.shape
        size = q.spec.grouping.length
        half = (q.spec.max_code + 1) // 2
        self.group_size = _kernel_group(size)
        self._repeats, self._shift = size // self.group_size, _MIDDLE - half
        codes = flat.spec.grouping.ungroup(flat.codes(torch.uint8)) + self._shift
        assert isinstance(flat.scale, Tensor) and isinstance(flat.zero, Tensor)
        s, zero = (stat.reshape(N, K // size) for stat in (flat.scale, flat.zero))
        exact = (half - zero.float()) * s.float()
        z = exact.to(dtype)
        missing = exact - z.float()
        keep = self.always_exact or (
            float(missing.norm()) * size**0.5 > _MUCH * float(flat.dequantize(dtype).float().norm())
        )
        self.register_buffer(
            "missing", missing.to(dtype).t().contiguous() if keep else None, persistent=False
        )
        both = torch.stack([s, z], dim=-1).transpose(0, 1).repeat_interleave(self._repeats, dim=0)
        self.register_buffer("packed", self.pack_codes(codes.contiguous()), persistent=False)
        self.register_buffer("s_and_z", both.contiguous(), persistent=False)

    packed: Tensor
    s_and_z: Tensor
    missing: Tensor | None

    def multiply(self, x: Tensor) -> Tensor:
        N, K = self.spec.shape
        rows = x.reshape(-1, K).contiguous()
        y = self.product(rows)
        if self.missing is not None:
            G = self.missing.shape[0]
            sums = rows.reshape(rows.shape[0], G, K // G).sum(-1)
            y = torch.addmm(y, sums, self.missing)
        return y.reshape(*x.shape[:-1], N)

    def product(self, x: Tensor) -> Tensor:
        """Return torch's product for x [M, K]."""
        raise NotImplementedError

    def pack_codes(self, codes: Tensor) -> Tensor:
        """Return codes [N, K] (uint8) in torch's arrangement."""
        raise NotImplementedError

    def unpack_codes(self) -> Tensor:
        """Return the codes [N, K] (uint8)."""
        raise NotImplementedError

    def codes_and_stats(self) -> tuple[Tensor, Tensor | QTensor, Tensor | QTensor]:
        fmt, grouping = self.spec.format, self.spec.grouping
        assert fmt is not None
        W_q = pack(grouping.group(self.unpack_codes() - self._shift), fmt)
        scale = self.s_and_z[:: self._repeats, :, 0].t().reshape(grouping.stat_shape).contiguous()
        zero = self.nested("zero") or self._buffers["zero"]
        assert zero is not None
        return W_q, self.nested("scale") or scale, zero


def why_not_int4(spec: QSpec, dtype: torch.dtype, rows: int, columns: int) -> str | None:
    """Return why torch's int4 product does not take a weight, None if it does: N a multiple of `rows`, K of `columns`.

    Codes of fewer than 4 bits are codes of 4 bits as well.
    """
    kernel = "torch's int4 product"
    if len(spec.shape) != 2 or spec.packing is None:
        return f"{kernel} takes matrices of packed codes"
    if spec.max_code > 15:
        return f"{kernel} takes codes of at most 4 bits, not of {spec.nbits:g}"
    if spec.axis != 1 or not spec.channel_wise:
        return (
            f"{kernel} takes axis=1, not axis={spec.axis}" if spec.channel_wise else f"{kernel} takes groups"
        )
    if dtype != torch.bfloat16:
        return f"{kernel} is used in bfloat16, not in {dtype}"
    N, K = spec.shape
    size = spec.grouping.length
    if K % size or not _kernel_group(size):
        return f"{kernel} takes groups of a multiple of 32 that divide the {K} inputs, not of {size}"
    if N % rows or K % columns:
        return f"{kernel} takes a multiple of {rows} outputs and of {columns} inputs, not {N} and {K}"
    return None


def _kernel_group(size: int) -> int:
    """Return the longest group of torch's product that divides groups of `size`, 0 if there is none."""
    return next((length for length in _GROUP_SIZES if size % length == 0), 0)
