"""The Marlin kernels for 4 and 8 bits, as vLLM ships them: vLLM is the package that can be called for them today."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hqq.backends.foreign import ForeignWeight, why_not_groups, why_not_there
from hqq.backends.patching import patch_with_backend
from hqq.core.prepared import plain
from hqq.core.qtensor import QSpec, QTensor
from hqq.errors import BackendError

# Bits of the kernel -> the code that stands for zero in it.
_MIDDLE = {4: 8, 8: 128}
_GROUP_SIZES = (32, 64, 128)
_ROWS, _COLUMNS = 64, 128


class MarlinWeight(ForeignWeight):
    """A weight for vLLM's Marlin product, which is symmetric: W is (c - middle) * scale, c = q + middle - half.

    What is missing, (half - zero) * scale for every group, times the sum of the group's inputs, is a second and much
    smaller product. half is the middle of the codes, so the second product is small in value too.
    """

    backend = "marlin"

    def __init__(self, q: QTensor, dtype: torch.dtype) -> None:
        super().__init__(q, dtype)
        flat = plain(q, dtype)
        N, K = q.spec.shape
        self.group_size = q.spec.grouping.length
        self.bits = _kernel_bits(q.spec)
        half = (q.spec.max_code + 1) // 2
        codes = flat.spec.grouping.ungroup(flat.codes(torch.int32)) + (_MIDDLE[self.bits] - half)
        assert isinstance(flat.scale, Tensor) and isinstance(flat.zero, Tensor)
        scale, zero = (stat.reshape(N, -1).t().contiguous() for stat in (flat.scale, flat.zero))
        marlin = _library()
        nothing = torch.empty(0, dtype=torch.int32, device=q.device)
        packed = marlin.repack(_stacked(codes, self.bits), nothing, K, N, self.bits)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("s", marlin.permute_scales(scale, K, N, self.group_size), persistent=False)
        self.register_buffer("offset", ((half - zero.float()) * scale.float()).to(dtype), persistent=False)
        self.register_buffer("nothing", nothing, persistent=False)
        self.register_buffer("workspace", marlin.workspace(q.device), persistent=False)
        # Held here, since torch.compile would trace the search for the library.
        self._linear, self._type = marlin.linear, marlin.types[self.bits]

    packed: Tensor
    s: Tensor
    offset: Tensor
    nothing: Tensor
    workspace: Tensor

    def multiply(self, x: Tensor) -> Tensor:
        N, K = self.spec.shape
        rows = x.reshape(-1, K).contiguous()
        y = self._linear(
            input=rows,
            weight=self.packed,
            weight_scale=self.s,
            weight_zp=self.nothing,
            g_idx=self.nothing,
            g_idx_sort_indices=self.nothing,
            workspace=self.workspace,
            wtype=self._type,
            output_size_per_partition=N,
            input_size_per_partition=K,
            is_k_full=True,
        )
        sums = (
            rows.reshape(rows.shape[0], K // self.group_size, self.group_size)
            .sum(-1, dtype=torch.float32)
            .to(x.dtype)
        )
        return torch.addmm(y, sums, self.offset).reshape(*x.shape[:-1], N)


def _kernel_bits(spec: QSpec) -> int:
    return 4 if spec.max_code <= 15 else 8


def _stacked(codes: Tensor, bits: int) -> Tensor:
    """Return codes [N, K] (int32) as Marlin's packing takes them: [K * bits / 32, N], the first input lowest."""
    fields = codes.t().reshape(codes.shape[1] * bits // 32, 32 // bits, -1)
    packed = torch.zeros_like(fields[:, 0])
    for index in range(32 // bits):
        packed |= fields[:, index] << (bits * index)
    return packed.contiguous()


@cache
def _library() -> Any:
    try:
        from vllm import _custom_ops as ops
        from vllm.model_executor.layers.quantization.utils import marlin_utils
        from vllm.scalar_type import scalar_types

        return SimpleNamespace(
            repack=ops.gptq_marlin_repack,
            permute_scales=marlin_utils.marlin_permute_scales,
            workspace=marlin_utils.marlin_make_workspace_new,
            linear=marlin_utils.apply_gptq_marlin_linear,
            types={4: scalar_types.uint4b8, 8: scalar_types.uint8b128},
        )
    except (ImportError, AttributeError, RuntimeError) as error:
        raise BackendError(f"this vllm cannot be called for Marlin ({error}); use another backend") from error


class MarlinBackend:
    """Codes of 8 bits and less (kept as 8 or 4), axis 1, groups of 32, 64, 128 or whole rows, fp16 and bf16."""

    name = "marlin"

    def available(self) -> str | None:
        return why_not_there("vllm", "pip install vllm, whose Marlin kernels are used")

    def supports(self, spec: QSpec, compute_dtype: torch.dtype, device: torch.device) -> str | None:
        reason = why_not_groups("Marlin", spec, device)
        if reason is not None:
            return reason
        N, K = spec.shape
        size = spec.grouping.length
        if compute_dtype not in (torch.float16, torch.bfloat16):
            return f"Marlin computes in float16 and bfloat16, not in {compute_dtype}"
        if size not in _GROUP_SIZES and size != K:
            return f"Marlin takes groups of 32, 64, 128 or whole rows, not of {size}"
        if N % _ROWS or K % _COLUMNS:
            return f"Marlin takes multiples of {_ROWS} outputs and {_COLUMNS} inputs, not {N} and {K}"
        return None

    def prepare(self, q: QTensor, dtype: torch.dtype) -> MarlinWeight:
        return MarlinWeight(q, dtype)


MATMUL = MarlinBackend()


def patch_hqq_to_marlin(layer: nn.Module, patch_params: Any = None) -> nn.Module:
    """Prepare an HQQLinear, or the one in an adapter, for Marlin and return `layer`; BackendError if it cannot."""
    return patch_with_backend(layer, "marlin")
