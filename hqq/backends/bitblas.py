"""The kernels that BitBLAS generates for 4, 2 and 1 bits."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from hqq.backends.foreign import ForeignWeight, why_not_groups, why_not_there
from hqq.backends.patching import patch_with_backend
from hqq.core.prepared import plain
from hqq.core.qtensor import QSpec, QTensor
from hqq.errors import BackendError

# The numbers of tokens that kernels are generated for; others are served by the next.
_TOKENS = (1, 16, 32, 64, 128, 256, 512)
_MULTIPLE = 16
# Bits of a code as stored here -> as BitBLAS takes them. Of 8 bits it stores all as signed, and not all of its kernels
# read them as unsigned again.
_BITS = {4: 4, 3: 4, 2: 2, 1: 1}
_GROUP_SIZES = (32, 64, 128, 256)


class BitblasWeight(ForeignWeight):
    """A weight for a `bitblas.Matmul`, W = (q - zero) * scale, which sums in float16.

    torch.compile cannot see into it: a compiled model has a graph break here.
    """

    backend = "bitblas"

    def __init__(self, q: QTensor, dtype: torch.dtype) -> None:
        super().__init__(q, dtype)
        flat = plain(q, dtype)
        N, K = q.spec.shape
        assert q.spec.format is not None
        self.matmul_of_library = _operator(N, K, _BITS[q.spec.format.bits], q.spec.grouping.length)
        codes = flat.spec.grouping.ungroup(flat.codes(torch.uint8)).contiguous().view(torch.int8)
        assert isinstance(flat.scale, Tensor) and isinstance(flat.zero, Tensor)
        scale, zero = (stat.reshape(N, -1).contiguous() for stat in (flat.scale, flat.zero))
        with torch.cuda.device(q.device):  # where it puts what it makes
            packed = self.matmul_of_library.transform_weight(codes)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("s", scale, persistent=False)
        self.register_buffer("z", zero, persistent=False)

    packed: Tensor
    s: Tensor
    z: Tensor

    def multiply(self, x: Tensor) -> Tensor:
        N, K = self.spec.shape
        with torch.cuda.device(x.device):  # of whose stream it asks
            y: Tensor = self.matmul_of_library(
                x.reshape(-1, K).contiguous(), self.packed, scale=self.s, zeros=self.z
            )
        return y.reshape(*x.shape[:-1], N)


@cache
def _operator(N: int, K: int, bits: int, group_size: int) -> Any:
    """Return BitBLAS's product for one shape; generating it takes it minutes, once."""
    try:
        library = import_module("bitblas")
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(f"this bitblas cannot be imported ({error}); use another backend") from error
    return library.Matmul(
        library.MatmulConfig(
            M=list(_TOKENS),
            N=N,
            K=K,
            A_dtype="float16",
            W_dtype=f"uint{bits}",
            accum_dtype="float16",
            out_dtype="float16",
            layout="nt",
            group_size=group_size,
            with_scaling=True,
            with_zeros=True,
            zeros_mode="original",
        )
    )


class BitblasBackend:
    """4 to 1 bits (3 kept as 4), axis 1, groups of 32, 64, 128, 256 or whole rows, float16."""

    name = "bitblas"

    def available(self) -> str | None:
        return why_not_there("bitblas", "pip install bitblas")

    def supports(self, spec: QSpec, compute_dtype: torch.dtype, device: torch.device) -> str | None:
        reason = why_not_groups("BitBLAS", spec, device)
        if reason is not None:
            return reason
        if compute_dtype != torch.float16:
            return f"BitBLAS is used in float16, not in {compute_dtype}"
        assert spec.format is not None
        if spec.format.bits not in _BITS:
            return f"BitBLAS is used for 4 bits and less, not for codes of {spec.format.bits}"
        size = spec.grouping.length
        if size not in _GROUP_SIZES and size != spec.shape[1]:
            return f"BitBLAS takes groups of 32, 64, 128, 256 or whole rows, not of {size}"
        if any(extent % _MULTIPLE for extent in spec.shape):
            return f"BitBLAS takes multiples of {_MULTIPLE} outputs and inputs, not {spec.shape}"
        return None

    def prepare(self, q: QTensor, dtype: torch.dtype) -> BitblasWeight:
        return BitblasWeight(q, dtype)


MATMUL = BitblasBackend()


def patch_hqq_to_bitblas(layer: nn.Module, patch_params: Any = None) -> nn.Module:
    """Prepare an HQQLinear, or the one in an adapter, for BitBLAS and return `layer`; BackendError if it cannot."""
    return patch_with_backend(layer, "bitblas")
