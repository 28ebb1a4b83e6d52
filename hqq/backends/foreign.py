"""Weights in the keeping of another library: its kernels on the GPU, the wire format in the computer's own memory."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from hqq.core.prepared import PreparedWeight
from hqq.core.qtensor import QSpec, QTensor

_CPU = torch.device("cpu")


class ForeignWeight(PreparedWeight):
    """A weight whose arrangement only a library knows. The codes wait on the CPU, from where they come back unchanged.

    Subclasses hold tensors of the library as buffers, or elsewhere and count their bytes in `nbytes`.
    """

    def __init__(self, q: QTensor, dtype: torch.dtype) -> None:
        nothing = torch.empty(0)
        super().__init__(QTensor(q.W_q, nothing, nothing, q.spec), dtype, keep=())
        self._wire = q.to(_CPU)
        self._device = q.device

    @property
    def device(self) -> torch.device:
        """Where the library's tensors are."""
        return self._device

    def to_qtensor(self) -> QTensor:
        return self._wire.to(self._device)

    def codes_and_stats(self) -> tuple[Tensor, Tensor | QTensor, Tensor | QTensor]:
        q = self.to_qtensor()
        return q.W_q, q.scale, q.zero

    def nested(self, name: str) -> QTensor | None:
        stat = getattr(self._wire, name)
        return stat.to(self._device) if isinstance(stat, QTensor) else None


def why_not_there(library: str, install: str) -> str | None:
    """Return why the kernels of `library` do not run here (not installed, or no GPU); None if they may."""
    if find_spec(library) is None:
        return f"{library} is not installed; {install}"
    if not torch.cuda.is_available():
        return f"{library} needs a CUDA device, and torch sees none"
    return None


def why_not_groups(library: str, spec: QSpec, device: torch.device) -> str | None:
    """Return why a library of kernels for groups along the inputs, on CUDA, does not take a weight; None if it may."""
    if device.type != "cuda":
        return f"the weight is on {device}, and {library} takes CUDA tensors"
    if len(spec.shape) != 2 or spec.packing is None or not spec.channel_wise:
        return f"{library} takes matrices of packed codes in groups"
    if spec.axis != 1 or spec.shape[1] % spec.grouping.length:
        return f"{library} takes groups along the inputs (axis=1) that do not cross rows"
    return None
