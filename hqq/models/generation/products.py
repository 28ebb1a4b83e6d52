"""The products of a layer with the norms, gates and sums around them: in one kernel for few tokens, else one by one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hqq.backends.merge import Projections
from hqq.kernels.decode_mlp import silu_mul
from hqq.kernels.decode_norm import add_norm
from hqq.kernels.tiled_gemv import Norm as KernelNorm
from hqq.kernels.tiled_step import step_linear, takes
from hqq.models.generation.family import Norm


@dataclass
class Stream:
    """What the tokens have become: `hidden + delta` [T, K]; delta is still to be added, which the next norm does."""

    hidden: Tensor
    delta: Tensor | None = None

    def at(self, rows: slice) -> Stream:
        """Return some of the tokens."""
        return Stream(
            self.hidden[rows].contiguous(), None if self.delta is None else self.delta[rows].contiguous()
        )

    def normed(self, norm: Norm) -> Tensor:
        """Return the norm of the sum, and keep the sum."""
        x = add_norm(self.hidden, self.delta, norm.weight, norm.eps)
        self.delta = None
        return x

    def project(self, norm: Norm, projections: Projections) -> tuple[Tensor, ...]:
        """Return the products of the norm with each layer's weight."""
        if self.delta is None and projections.weight is not None and takes(projections.weight, self.hidden):
            y = step_linear(self.hidden, projections.weight, projections.bias, norm=_for_kernel(norm))
            return projections.split(y)
        return projections(self.normed(norm))

    def gated(self, norm: Norm, gate_up: Projections) -> Tensor:
        """Return `silu(gate) * up` of the norm's products with two weights."""
        if (
            self.delta is None
            and gate_up.weight is not None
            and takes(gate_up.weight, self.hidden, gated=True)
        ):
            return step_linear(self.hidden, gate_up.weight, gate_up.bias, norm=_for_kernel(norm), gated=True)
        return silu_mul(*self.project(norm, gate_up))

    def plus(self, x: Tensor, projection: Projections) -> Stream:
        """Return the stream with the product of `x` and one weight added."""
        if self.delta is None and projection.weight is not None and takes(projection.weight, x):
            return Stream(step_linear(x, projection.weight, projection.bias, residual=self.hidden))
        (delta,) = projection(x)
        return Stream(self.hidden, delta)


def _for_kernel(norm: Norm) -> KernelNorm:
    return KernelNorm(norm.weight, norm.eps)
