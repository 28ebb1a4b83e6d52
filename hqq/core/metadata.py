"""A quantised scale or zero as a module, so that it moves, copies and pickles with the layer that owns it."""

from __future__ import annotations

from torch import Tensor, nn

from hqq.core.qtensor import QTensor


class QuantizedMetadata(nn.Module):
    """Holds the codes, scale and zero of a quantised scale or zero as buffers; its owner writes its state."""

    W_q: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, q: QTensor) -> None:
        super().__init__()
        if isinstance(q.scale, QTensor) or isinstance(q.zero, QTensor):
            raise TypeError("got metadata quantised twice; expected one level")
        self.spec = q.spec
        # Not persistent: the owning layer writes these under the keys of the wire format.
        self.register_buffer("W_q", q.W_q, persistent=False)
        self.register_buffer("scale", q.scale, persistent=False)
        self.register_buffer("zero", q.zero, persistent=False)

    def qtensor(self) -> QTensor:
        """Return the tensors and their description."""
        return QTensor(self.W_q, self.scale, self.zero, self.spec)
