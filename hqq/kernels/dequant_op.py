"""`hqq::dequantize` as a torch operator: schema, shape function, the torch reference, and the kernel for CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from hqq.core.qtensor import QSpec, QTensor
from hqq.errors import ConfigError
from hqq.kernels.availability import interpreting, triton_missing_reason
from hqq.kernels.dequant_config import Config, check_config
from hqq.kernels.dequant_plan import Stat, check_call, spec_of

# The quantised forms of scale and zero are spelled out, since an operator takes tensors and numbers only. An empty
# `config` means the tuned or shipped choice; else it has the numbers of `Config`.
SCHEMA = (
    "dequantize(Tensor W_q, Tensor scale, Tensor? scale_scale, Tensor? scale_zero, Tensor zero, Tensor? zero_scale, "
    "Tensor? zero_zero, float nbits, int[] shape, int? group_size, int axis, bool channel_wise, str packing, "
    "int scale_axis, int zero_axis, ScalarType dtype, ScalarType out_dtype, int[] config, bool autotune) -> Tensor"
)


class _Call:
    """The operator's arguments, checked."""

    def __init__(
        self,
        W_q: Tensor,
        scale: Tensor,
        scale_scale: Tensor | None,
        scale_zero: Tensor | None,
        zero: Tensor,
        zero_scale: Tensor | None,
        zero_zero: Tensor | None,
        nbits: float,
        shape: list[int],
        group_size: int | None,
        axis: int,
        channel_wise: bool,
        packing: str,
        scale_axis: int,
        zero_axis: int,
        dtype: torch.dtype,
        out_dtype: torch.dtype,
        config: list[int],
        autotune: bool,
    ) -> None:
        self.W_q, self.dtype, self.out_dtype, self.autotune = W_q, dtype, out_dtype, autotune
        self.scale = Stat(scale, scale_scale, scale_zero, scale_axis)
        self.zero = Stat(zero, zero_scale, zero_zero, zero_axis)
        self.spec: QSpec = spec_of(nbits, tuple(shape), group_size, axis, channel_wise, packing)
        check_call(W_q, self.scale, self.zero, self.spec, dtype, out_dtype)
        if config and not 3 <= len(config) <= len(Config._fields):
            raise ConfigError(
                f"got config={config}; expected {', '.join(Config._fields)}, the first three at least"
            )
        self.config = check_config(Config(*config)) if config else None

    def reference(self) -> Tensor:
        stat_shape = self.spec.grouping.stat_shape
        q = QTensor(self.W_q, self.scale.reference(stat_shape), self.zero.reference(stat_shape), self.spec)
        return q.dequantize(self.dtype).to(self.out_dtype)

    def kernel(self) -> Tensor:
        # Here and not at the top: launching imports triton, which may be absent.
        from hqq.kernels.dequant_launch import launch
        from hqq.kernels.dequant_tune import choose_config

        arguments = (self.W_q, self.scale, self.zero, self.spec, self.dtype, self.out_dtype)
        return launch(*arguments, self.config or choose_config(*arguments, autotune=self.autotune))


def _on_any_device(*args: object) -> Tensor:
    call = _Call(*args)  # type: ignore[arg-type]
    return call.kernel() if interpreting() and call.W_q.device.type == "cpu" else call.reference()


def _on_cuda(*args: object) -> Tensor:
    call = _Call(*args)  # type: ignore[arg-type]
    return call.kernel() if triton_missing_reason() is None else call.reference()


def _fake(*args: object) -> Tensor:
    call = _Call(*args)  # type: ignore[arg-type]
    return call.W_q.new_empty(call.spec.shape, dtype=call.out_dtype)


LIBRARY = torch.library.Library("hqq", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
LIBRARY.impl("dequantize", _on_any_device, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
LIBRARY.impl("dequantize", _on_cuda, "CUDA")  # type: ignore[no-untyped-call]
torch.library.register_fake("hqq::dequantize", _fake, lib=LIBRARY)

dequantize_op = torch.ops.hqq.dequantize.default
