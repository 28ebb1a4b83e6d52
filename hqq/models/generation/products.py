"""The products of a layer with the norms, gates and sums around them: in one kernel for few tokens, else one by one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hqq.backends.merge import Projections
from hqq.kernels.decode_mlp import silu_mul
from hqq.kernels.decode_norm import add_norm
from hqq.kernels.tiled_gemv import Norm
from hqq.kernels.tiled_step import NORM_TOKENS, step_linear, takes


@dataclass
class Stream:
    """What the tokens have become: `hidden + delta` [T, K]; delta is still to be added, which the next norm does."""

    hidden: Tensor
    delta: Tensor | None = None

    def at(self, rows: Tensor) -> Stream:
        """Return the tokens at `rows` [B]."""
        return Stream(self.hidden[rows], None if self.delta is None else self.delta[rows])

    def normed(self, norm: Norm) -> Tensor:
        """Return the norm of the sum, and keep the sum."""
        x = add_norm(self.hidden, self.delta, norm.weight, norm.eps)
        self.delta = None
        return x

    def project(self, norm: Norm, projections: Projections) -> tuple[Tensor, ...]:
        """Return the products of the norm with each layer's weight."""
        weight = projections.weight
        if weight is None or not self._brings_norm() or not takes(weight, self.hidden):
            return projections(self.normed(norm))
        return projections.split(step_linear(self.hidden, weight, projections.bias, norm=norm))

    def gated(self, norm: Norm, gate_up: Projections) -> Tensor:
        """Return `silu(gate) * up` of the norm's products with two weights."""
        weight = gate_up.weight
        if weight is None or not takes(weight, self.hidden, gated=True):
            return silu_mul(*self.project(norm, gate_up))
        if not self._brings_norm():
            return step_linear(self.normed(norm), weight, gate_up.bias, gated=True)
        return step_linear(self.hidden, weight, gate_up.bias, norm=norm, gated=True)

    def plus(self, x: Tensor, projection: Projections) -> Stream:
        """Return the stream with the product of `x` and one weight added."""
        weight = projection.weight
        if weight is None or self.delta is not None or not takes(weight, x):
            (delta,) = projection(x)
            return Stream(self.hidden, delta)
        return Stream(step_linear(x, weight, projection.bias, residual=self.hidden))

    def _brings_norm(self) -> bool:
        """Whether a product that is one kernel brings the norm along: it cannot add what is still to be added."""
        return self.delta is None and len(self.hidden) <= NORM_TOKENS
