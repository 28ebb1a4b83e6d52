"""Dequantisation by the Triton kernels of hqq.kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from hqq.core.qtensor import QSpec, QTensor
from hqq.kernels import dequantize
from hqq.kernels.availability import device_reason, unavailable_reason
from hqq.kernels.dequant_plan import KERNEL_DTYPES


class TritonBackend:
    """One kernel launch for each dequantised weight, on CUDA."""

    name = "triton"

    def available(self) -> str | None:
        return unavailable_reason()

    def supports(self, spec: QSpec, compute_dtype: torch.dtype, device: torch.device) -> str | None:
        if spec.packing is None:
            return "the codes are not packed (bitpack=False)"
        if compute_dtype not in KERNEL_DTYPES:
            return f"the Triton kernels compute in float16, bfloat16 and float32, not in {compute_dtype}"
        return device_reason(device)

    def dequantize(
        self,
        W_q: Tensor,
        scale: Tensor | QTensor,
        zero: Tensor | QTensor,
        spec: QSpec,
        compute_dtype: torch.dtype,
    ) -> Tensor:
        assert spec.packing is not None
        return dequantize(
            W_q,
            scale,
            zero,
            nbits=spec.nbits,
            shape=spec.shape,
            group_size=spec.group_size,
            axis=spec.axis,
            packing=spec.packing,
            channel_wise=spec.channel_wise,
            compute_dtype=compute_dtype,
        )


BACKEND = TritonBackend()
