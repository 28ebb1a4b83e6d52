"""HQQExperts: the weights of many experts, [E, N, K], stored as codes and dequantised one expert at a time.

Mixture-of-experts models fuse the matrices of all experts into one parameter. Every expert is quantised by itself, as
an `HQQLinear` would be, and the tensors of all of them are stacked: `W_q`, `scale` and `zero` have the experts as their
first dimension, so that one expert can be sliced out. In the wire format `shape` is [E, N, K].
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hqq.core.backend import Selection, select
from hqq.core.devices import DeviceLike, resolve_device
from hqq.core.expert_stack import is_stack, part, part_of_state, stack
from hqq.core.layer_state import missing_keys, unexpected_keys
from hqq.core.linear import HQQLinear
from hqq.core.qtensor import QSpec, QTensor
from hqq.core.quantized_module import QuantizedModule
from hqq.core.wire import decode_state
from hqq.errors import HQQError, MissingKeysError, NotQuantizedError, ShapeError


class HQQExperts(QuantizedModule):
    """The quantised form of a parameter [E, N, K], in the place and under the name of that parameter.

    `experts[i]` is the dequantised matrix [N, K] of expert i; code written for the parameter runs unchanged. Built by
    `from_weights`, or empty and filled by `load_state_dict`.
    """

    def __init__(
        self,
        shape: Sequence[int] | None = None,
        compute_dtype: torch.dtype = torch.float16,
        device: DeviceLike = None,
    ) -> None:
        super().__init__(compute_dtype, device)
        self._shape = None if shape is None else torch.Size(shape)

    @classmethod
    def from_weights(
        cls,
        weight: Tensor,
        quant_config: Mapping[str, Any],
        compute_dtype: torch.dtype = torch.float16,
        device: DeviceLike = None,
    ) -> HQQExperts:
        """Return the quantised form of `weight` [E, N, K] of any float dtype, which is left as it is.

        device: where to put it; None means the weight's own. Raises ShapeError for another number of dimensions, and
        what `HQQLinear` raises for a matrix that cannot be quantised.
        """
        if weight.ndim != 3 or 0 in weight.shape:
            raise ShapeError(
                f"got a weight of shape {tuple(weight.shape)}; expected three dimensions [experts, out, in]"
            )
        target = resolve_device(device, weight.device)
        experts = cls(weight.shape, compute_dtype, target)
        layers = (
            HQQLinear.from_weights(W, None, quant_config, compute_dtype, target) for W in weight.detach()
        )
        experts._stack(list(layers))
        return experts

    def _stack(self, layers: Sequence[HQQLinear]) -> None:
        first = layers[0]
        self.quant_config, self.offload_meta = first.quant_config, first.offload_meta
        self._set_qtensor(stack([layer.qtensor() for layer in layers]))
        self._features_from_shape()

    def expert(self, index: int) -> QTensor:
        """Return the quantised matrix of one expert; raises IndexError outside [-E, E)."""
        if self.W_q is None or self._spec is None:
            raise NotQuantizedError("got HQQExperts without weights; call load_state_dict(...) first")
        return part(QTensor(self.W_q, self._stat("scale"), self._stat("zero"), self._spec), index)

    def dequantize(self) -> Tensor:
        """Return the weights of all experts, [E, N, K], in the compute dtype."""
        return torch.stack(list(self))

    def unpack(self, reshape: bool = False, dtype: torch.dtype | None = None) -> Tensor | None:
        """Return the codes of all experts: the grouped matrices, or in the shape of the weights, in `dtype`."""
        if not self.is_initialized():
            return None
        parts = [self.expert(index) for index in range(len(self))]
        codes = [q.codes(dtype or self._compute_dtype) for q in parts]
        if reshape:
            codes = [q.spec.grouping.ungroup(c) for q, c in zip(parts, codes, strict=True)]
        return torch.stack(codes)

    def _prepared_spec(self) -> QSpec:
        return self.expert(0).spec

    def _why_only_dequantized(self) -> str | None:
        return "experts are read as matrices, one by one, and dequantised for that"

    # What code written for the parameter asks of it

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self._matrix(index) for index in range(len(self)))

    def __getitem__(self, index: Any) -> Tensor:
        """Return what the dequantised [E, N, K] has at `index`; only the experts that a number, a slice or a tensor
        of expert numbers names are dequantised."""
        if isinstance(index, int):
            return self._matrix(index)
        if isinstance(index, slice):
            return self._matrices(range(len(self))[index])
        if isinstance(index, Tensor) and not index.dtype.is_floating_point and index.dtype != torch.bool:
            if index.ndim == 0:
                return self._matrix(int(index))
            routed, position = torch.unique(index, return_inverse=True)
            return self._matrices(routed.tolist())[position]
        return self.dequantize()[index]

    def _matrix(self, index: int) -> Tensor:
        q = self.expert(index)
        dtype = self._compute_dtype
        scale, zero = (s.dequantize(dtype) if isinstance(s, QTensor) else s for s in (q.scale, q.zero))
        return self.selection().backend.dequantize(q.W_q, scale, zero, q.spec, dtype)

    def _matrices(self, indices: Sequence[int]) -> Tensor:
        if not indices:
            return torch.empty((0, *self.shape[1:]), dtype=self._compute_dtype, device=self.device)
        return torch.stack([self._matrix(index) for index in indices])

    def selection(self) -> Selection:
        """Return the backend that the experts use and, if it is not the one asked for, the reason."""
        if self._selection is None or self._selected_for is not self.backend:
            q = self.expert(0)
            self._selection = select(self.backend.value, q.spec, self._compute_dtype, q.W_q.device)
            self._selected_for = self.backend
        return self._selection

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Let torch functions take the experts as the dense tensor they stand for, as in `torch.bmm(x, experts)`."""

        def dense(value: Any) -> Any:
            return value.dequantize() if isinstance(value, HQQExperts) else value

        args, kwargs = tree_map(dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def transpose(self, dim0: int, dim1: int) -> Tensor:
        """Return the dequantised weights with two dimensions exchanged."""
        return self.dequantize().transpose(dim0, dim1)

    @property
    def shape(self) -> torch.Size:
        """[E, N, K]; raises NotQuantizedError before there are weights or a declared shape."""
        if self._shape is None:
            raise NotQuantizedError("got HQQExperts without weights; call load_state_dict(...) first")
        return self._shape

    def size(self, dim: int | None = None) -> Any:
        """Return `shape`, or the extent of one dimension."""
        return self.shape if dim is None else self.shape[dim]

    @property
    def ndim(self) -> int:
        """3."""
        return 3

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the dequantised weights."""
        return self._compute_dtype

    # State

    def stored_shape(self) -> tuple[int, ...]:
        """Return [E, N, K]."""
        return tuple(self.shape)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the state of all experts; raises what `HQQLinear.load_state_dict` raises."""
        missing, unexpected = missing_keys(state_dict), unexpected_keys(state_dict)
        if missing or (strict and unexpected):
            raise MissingKeysError(
                f"got the state of experts with missing keys {missing} and unknown keys {unexpected}; expected those "
                "of a quantised layer, stacked. Was it written by hqq?"
            )
        self._read(decode_state(state_dict))
        return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)

    def _read(self, state: Mapping[str, Any]) -> None:
        shape = torch.Size(state["shape"])
        if len(shape) != 3 or (self._shape is not None and shape != self._shape):
            expected = "[experts, out, in]" if self._shape is None else tuple(self._shape)
            raise ShapeError(f"got quantised experts of shape {tuple(shape)}; expected {expected}")
        if not is_stack(state, shape[0]):
            raise ShapeError(f"got codes or scales that are not those of {shape[0]} experts, stacked")
        layers = []
        for index in range(shape[0]):
            layer = HQQLinear(None, None, compute_dtype=self.compute_dtype, device=self.device)
            layer.load_state_dict({**part_of_state(state, index), "shape": shape[1:]}, strict=False)
            layers.append(layer)
        self._shape = shape
        self._stack(layers)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        absent = missing_keys(own)
        unexpected.extend(prefix + key for key in unexpected_keys(own))
        missing.extend(prefix + key for key in absent)
        if absent:
            return
        try:
            self.load_state_dict(own, strict=False)
        except HQQError as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")

    def _features_from_shape(self) -> None:
        assert self._spec is not None and self.W_q is not None
        self._shape = torch.Size((self.W_q.shape[0], *self._spec.shape))

    def extra_repr(self) -> str:
        if self._spec is None or self._shape is None:
            return "not quantised"
        s = self._spec
        return f"shape={tuple(self._shape)}, nbits={s.nbits}, group_size={s.group_size}, axis={s.axis}"


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (full name, owner, name in the owner) of every parameter of `model` that fuses the matrices of experts.

    That is a floating-point parameter of three dimensions, owned directly by a module that is called or whose class
    is called something with "expert". Experts that are nn.Linear layers of their own are ordinary layers.
    """
    for name, module in model.named_modules():
        titles = (type(module).__name__.lower(), name.rpartition(".")[2].lower())
        if isinstance(module, QuantizedModule) or not any("expert" in title for title in titles):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and parameter.is_floating_point():
                yield f"{name}.{leaf}" if name else leaf, module, leaf


def replace_parameter(owner: nn.Module, leaf: str, experts: HQQExperts) -> None:
    """Put `experts` in the place of the parameter called `leaf` of `owner`."""
    del owner._parameters[leaf]
    owner.add_module(leaf, experts)


class ExpertWeight(nn.Module):
    """A fused expert parameter, held as `weight` by a module of its own while layers are being replaced."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


@contextmanager
def experts_as_modules(model: nn.Module, names: Container[str] | None = None) -> Iterator[None]:
    """Within the context fused expert parameters of `model`, all or those among `names`, are each an `ExpertWeight`.

    So each is found, named and replaced like any layer. At the end, those still there are parameters again.
    """
    _hold(model, names)
    try:
        yield
    finally:
        _release(model)


def _hold(model: nn.Module, names: Container[str] | None) -> None:
    for name, owner, leaf in list(expert_parameters(model)):
        if names is not None and name not in names:
            continue
        weight = owner._parameters.pop(leaf)
        assert weight is not None
        owner.add_module(leaf, ExpertWeight(weight))


def _release(model: nn.Module) -> None:
    for owner in list(model.modules()):
        for leaf, child in list(owner._modules.items()):
            if isinstance(child, ExpertWeight):
                del owner._modules[leaf]
                owner.register_parameter(leaf, child.weight)
