"""Projections that share an input as one product: their weights one behind the other in memory.

Joining moves codes and scales of prepared layers into common tensors, of which each layer then holds its own part as a
view. Layers compute what they did, give the same state_dict, and go their own ways again when they are restored, moved
or cast; who calls several of them with one input can multiply with all of them at once (`Projections`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hqq.core.linear import HQQLinear
from hqq.errors import BackendError, ConfigError
from hqq.kernels.tiled_op import tiled_linear
from hqq.kernels.tiled_weight import TiledWeight

_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Merge:
    """What became of layers that share an input: `reason` says why their weights are not joined, if they are not."""

    layers: tuple[str, ...]
    reason: str | None = None


class Projections:
    """The products of one input with several layers: one product if their weights are joined, else one each.

    Holds for the layers as they are now: after a move, a cast or a new preparation of them, make another one.

    Attributes:
        weight: the joined weight, or None, and then `reason` says why; bias: what goes with it, [N] or None.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = tuple(modules)
        self.reason: str | None = None
        self.weight: TiledWeight | None = None
        self.bias: Tensor | None = None
        try:
            self.weight = join(self.modules)
        except BackendError as error:
            self.reason = str(error)
            return
        self._sizes = [part.shape[0] for part in self.weight.parts]
        self.bias = _joined_bias(self.modules, self.weight)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return each layer's result for x [..., K], bias included; the results may be views of one tensor."""
        if self.weight is None:
            return tuple(module(x) for module in self.modules)
        return self.split(tiled_linear(x, self.weight, self.bias))

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """Return each layer's part of what the joined weight gives, [..., N]."""
        return torch.split(y, self._sizes, dim=-1)


def merge_projections(model: nn.Module) -> tuple[Merge, ...]:
    """Join the query, key and value projections of `model`, and the gate and up projections, where they are prepared.

    Exact, without more memory, and undone by `restore`. Returns one row for each such group of quantised layers.
    """
    rows = []
    for name, parent in model.named_modules():
        for group in _GROUPS:
            modules = [parent._modules.get(member) for member in group]
            if not all(isinstance(module, HQQLinear) for module in modules):
                continue
            names = tuple(f"{name}.{member}" if name else member for member in group)
            try:
                join([module for module in modules if module is not None])
                rows.append(Merge(names))
            except BackendError as error:
                rows.append(Merge(names, str(error)))
    return tuple(rows)


def join(modules: Sequence[nn.Module]) -> TiledWeight:
    """Return the weights of `modules`, prepared for the native kernels, as one, of which they hold the parts then.

    Raises BackendError, and leaves the layers as they are, if that cannot be.
    """
    from hqq.backends.native import NativeWeight

    layers, weights = [], []
    for module in modules:
        prepared = module.prepared if type(module) is HQQLinear else None
        if not isinstance(module, HQQLinear) or not isinstance(prepared, NativeWeight):
            raise BackendError("a projection is not prepared for the native kernels")
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise BackendError("a projection has hooks, or another forward than its own")
        layers.append(module)
        weights.append(prepared)
    together = _already_joined([weight.tiled for weight in weights])
    if together is not None:
        return together
    try:
        together = TiledWeight.cat([weight.tiled for weight in weights])
    except ConfigError as error:
        raise BackendError(str(error)) from error
    for layer, weight, part in zip(layers, weights, together.split(), strict=True):
        layer.hold(weight.stored_in(part))
    return together


def _already_joined(weights: Sequence[TiledWeight]) -> TiledWeight | None:
    """Return the weight whose parts `weights` are, in this order, or None if they are not."""
    codes, meta = _adjacent([w.codes for w in weights]), _adjacent([w.meta for w in weights])
    if codes is None or meta is None:
        return None
    return TiledWeight.joined(weights, codes, meta)


def _adjacent(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return the tensor whose slices along the first dimension lie in memory as `tensors` do, or None."""
    first = tensors[0]
    place, count = first.storage_offset(), 0
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        alike = tensor.dtype == first.dtype and tensor.shape[1:] == first.shape[1:] and tensor.is_contiguous()
        if not same or not alike or tensor.storage_offset() != place:
            return None
        place += tensor.numel()
        count += tensor.shape[0]
    return first.as_strided((count, *first.shape[1:]), first.stride())


def _joined_bias(modules: Sequence[nn.Module], weight: TiledWeight) -> Tensor | None:
    biases = [module.bias for module in modules]
    if all(bias is None for bias in biases):
        return None
    pieces = [
        bias.detach() if isinstance(bias, Tensor) else weight.meta.new_zeros(spec.shape[0])
        for bias, spec in zip(biases, weight.parts, strict=True)
    ]
    return torch.cat(pieces)
