"""A quantised scale or zero as a module, so that it moves, copies and pickles with the layer that owns it."""

from __future__ import annotations

from typing import Any

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
        # Persistent, though the owner writes and reads them: loaders take other buffers for what can be made anew.
        self.register_buffer("W_q", q.W_q)
        self.register_buffer("scale", q.scale)
        self.register_buffer("zero", q.zero)

    def qtensor(self) -> QTensor:
        """Return the tensors and their description."""
        return QTensor(self.W_q, self.scale, self.zero, self.spec)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Write nothing: the owner writes these under the keys of the wire format."""

    def _load_from_state_dict(self, *args: Any) -> None:
        """Read nothing: the owner does."""
