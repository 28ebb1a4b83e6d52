"""A weight in the form that a backend multiplies with: what every such form offers, and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from hqq.core.metadata import QuantizedMetadata
from hqq.core.qtensor import QSpec, QTensor
from hqq.errors import BackendError


class PreparedWeight(nn.Module):
    """A quantised weight [N, K] arranged for one backend's product, with an exact way back to the wire format.

    Subclasses give `multiply` and `codes_and_stats`.
    A prepared weight stays where it is: the layer that holds it goes back to codes to be moved, cast or written.

    Args:
        q: the weight it is made from; its spec is kept, and its scale and zero if quantised or named in `keep`.
        dtype: of x, y, scale and zero.
        keep: which of "scale" and "zero" cannot be derived from the prepared form.
    """

    backend: str

    def __init__(self, q: QTensor, dtype: torch.dtype, keep: tuple[str, ...] = ("scale", "zero")) -> None:
        super().__init__()
        self.spec = q.spec
        self.dtype = dtype
        self._stored_as = q.W_q.dtype
        for name, stat in (("scale", q.scale), ("zero", q.zero)):
            if isinstance(stat, QTensor):
                self.add_module(f"{name}_quantized", QuantizedMetadata(stat))
            elif name in keep:
                self.register_buffer(name, stat, persistent=False)

    def multiply(self, x: Tensor) -> Tensor:
        """Return `x @ W^T`: x [..., K] in `dtype`, result [..., N]; needs no gradient of its own."""
        raise NotImplementedError

    def codes_and_stats(self) -> tuple[Tensor, Tensor | QTensor, Tensor | QTensor]:
        """Return packed codes (in the integer dtype of their format), scale and zero of the wire format."""
        raise NotImplementedError

    def nested(self, name: str) -> QTensor | None:
        """Return the quantised scale or zero (`name`) that was kept, or None if it is not quantised."""
        module = self._modules.get(f"{name}_quantized")
        return module.qtensor() if isinstance(module, QuantizedMetadata) else None

    def to_qtensor(self) -> QTensor:
        """Return the weight in the wire format, bit for bit what it was made from."""
        W_q, scale, zero = self.codes_and_stats()
        if W_q.dtype != self._stored_as:
            W_q = W_q.view(self._stored_as)
        return QTensor(W_q, scale, zero, self.spec)

    def dequantize(self) -> Tensor:
        """Return `(W_q - zero) * scale` [N, K] in `dtype`."""
        return self.to_qtensor().dequantize(self.dtype)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `x @ W^T + bias`, differentiable in x and bias: x [..., K] in `dtype`, result [..., N]."""
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _Multiply.apply(x, self.multiply, self.dequantize)  # type: ignore[no-untyped-call]
        else:
            y = self.multiply(x)
        return y if bias is None else y + bias

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.buffers()).device

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept on the device."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoReturn:
        raise BackendError(
            f"got a move or a cast of a {type(self).__name__} by itself; move or cast the layer that holds it"
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Write nothing: the layer writes the codes."""

    def _load_from_state_dict(self, *args: Any) -> None:
        """Read nothing: the layer does."""

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}, {self.nbytes} bytes"


class _Multiply(torch.autograd.Function):
    """The product with a prepared weight; the backward pass dequantises, and nothing of size N x K is kept for it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, multiply: Callable[[Tensor], Tensor], dequantize: Callable[[], Tensor]
    ) -> Tensor:
        ctx.dequantize = dequantize
        return multiply(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        W = ctx.dequantize()
        return (grad_output @ W.to(grad_output.dtype)).to(W.dtype), None, None


class MatmulBackend(Protocol):
    """Multiplies with quantised weights that it prepares. Instances have no state and are shared by all layers."""

    name: str

    def available(self) -> str | None:
        """Return None if the backend runs on this machine, else a sentence that says why not."""
        ...

    def supports(self, spec: QSpec, compute_dtype: torch.dtype, device: torch.device) -> str | None:
        """Return None if the backend takes weights of this description, else a sentence that says why not."""
        ...

    def prepare(self, q: QTensor, dtype: torch.dtype) -> PreparedWeight:
        """Return `q`, which `supports` accepts, prepared for products in `dtype`."""
        ...


def plain(q: QTensor, dtype: torch.dtype) -> QTensor:
    """Return `q` with integer codes and with scale and zero as tensors of `dtype`: what kernels take."""
    fmt = q.spec.format
    W_q = q.W_q if fmt is None or q.W_q.dtype == fmt.dtype else q.W_q.view(fmt.dtype)
    scale, zero = (s.dequantize(dtype) if isinstance(s, QTensor) else s.to(dtype) for s in (q.scale, q.zero))
    return QTensor(W_q.detach(), scale, zero, replace(q.spec, view_as_float=False))
