"""What a checkpoint consists of, whether it comes from a model or from files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

LayerState = dict[str, Any]


class Source(Protocol):
    """Quantised layers and plain tensors by name.

    units: every layer and plain tensor in model order, with its bytes. layers: which of them are layers.
    shared: further names of layers and tensors, to the unit whose tensors they use. A layer among them may have a
    bias of its own, which is the plain tensor `<name>.bias`.
    """

    @property
    def units(self) -> Mapping[str, int]: ...

    @property
    def layers(self) -> frozenset[str]: ...

    @property
    def shared(self) -> Mapping[str, str]: ...

    def layer(self, name: str) -> LayerState:
        """Return a layer's state, values of raw Python types; raises CheckpointError."""
        ...

    def tensor(self, name: str) -> Tensor:
        """Return a plain tensor; raises CheckpointError."""
        ...


def state_bytes(state: Mapping[str, Any]) -> int:
    """Return the bytes of all tensors in a layer's state, nested ones included."""
    return sum(
        value.nbytes if isinstance(value, Tensor) else state_bytes(value) if isinstance(value, Mapping) else 0
        for value in state.values()
    )
