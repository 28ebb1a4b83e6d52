"""The module that stores a quantised weight: what HQQLinear and HQQEmbedding share."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hqq.core.backend import HQQBackend, Selection, select
from hqq.core.config import LegacyConfig
from hqq.core.devices import DeviceLike, resolve_device
from hqq.core.dtypes import check_compute_dtype
from hqq.core.layer_state import LayerStateMixin
from hqq.core.meta import meta_of, qtensor_from_meta
from hqq.core.meta_view import MetaView
from hqq.core.metadata import QuantizedMetadata
from hqq.core.preparation import Preparation, PreparedMixin
from hqq.core.qtensor import QSpec, QTensor
from hqq.errors import BackendError, NotQuantizedError

_TENSORS = ("W_q", "bias")
_PLAIN = {bool, int, str, dict, type(None), torch.dtype, torch.device, QSpec}
_WIRE = ("W_q", "scale", "zero")


class QuantizedModule(PreparedMixin, LayerStateMixin, nn.Module):
    """Packed codes as a parameter without gradient, scale and zero as buffers (or as modules where quantised).

    The nn.Module protocol holds: `.to()` moves everything, a dtype changes the compute dtype and never the codes,
    copies and pickles are independent layers. `state_dict` is the wire format of the original, also of a layer whose
    weight is `prepared` for a backend.
    """

    backend: HQQBackend = HQQBackend.PYTORCH

    W_q: nn.Parameter | None
    bias: nn.Parameter | None
    scale: Tensor | None
    zero: Tensor | None

    def __init__(self, compute_dtype: torch.dtype, device: DeviceLike) -> None:
        super().__init__()
        self.register_parameter("W_q", None)
        self.register_parameter("bias", None)
        self.register_buffer("scale", None)
        self.register_buffer("zero", None)
        self._spec: QSpec | None = None
        self._extra_meta: dict[str, Any] = {}
        self._meta_view: weakref.ref[MetaView] | None = None
        self._selection: Selection | None = None
        self._selected_for: HQQBackend | None = None
        self._preparation: Preparation | None = None
        self._compute_dtype = check_compute_dtype(compute_dtype)
        self._device = device
        self.quant_config: LegacyConfig | None = None
        self.offload_meta: bool | None = None
        self.encoded_state_dict = True
        self.in_gpu = False

    # What old callers read and write

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            return  # the weight is the codes; callers that attach a dummy weight lose nothing
        if name in _WIRE and self.prepared is not None:
            self.unprepare()
        if type(value) in _PLAIN and not self._registers(name):
            # What nn.Module would come to after a dozen checks, which are a fifth of the cost of making a layer.
            object.__setattr__(self, name, value)
            return
        is_plain = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
        # Whoever deletes the parameter first (FSDP, which keeps its own and lends views of it) gets a plain attribute.
        if name in _TENSORS and name in self._parameters and is_plain:
            value = nn.Parameter(value.detach(), requires_grad=False)
        elif name == "W_q" and isinstance(value, nn.Parameter):
            value.requires_grad_(False)  # nn.Parameter(codes viewed as float) would train them
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in _WIRE and self._modules.get("prepared_weight") is not None:
            own = self._parameters if name == "W_q" else self._buffers
            return own[name] if name in own else self._wire_copy(name)
        return super().__getattr__(name)

    def __delattr__(self, name: str) -> None:
        if name in _WIRE and self.prepared is not None:
            self.unprepare()
        super().__delattr__(name)

    def _registers(self, name: str) -> bool:
        own = self.__dict__
        return name in own["_parameters"] or name in own["_buffers"] or name in own["_modules"]

    @property
    def weight(self) -> Tensor:
        """An empty tensor (length 0) of the compute dtype on the layer's device: the weight exists only as codes."""
        return torch.empty(0, dtype=self.compute_dtype, device=self.device)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of scale, zero, bias and the dequantised weight. Setting it casts them."""
        return self._compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype) -> None:
        if check_compute_dtype(dtype) != self._compute_dtype:
            self._compute_dtype = dtype
            self.to(dtype)

    @property
    def device(self) -> torch.device:
        """Where the codes are, or, before there are any, where they will be."""
        if self.prepared is not None:
            return self.prepared.device
        return self.W_q.device if self.W_q is not None else resolve_device(self._device)

    @device.setter
    def device(self, device: DeviceLike) -> None:
        self._device = device

    @property
    def meta(self) -> MetaView | None:
        """The description as a dict that writes through to the layer, or None before quantisation."""
        if self._spec is None:
            return None
        view = self._meta_view() if self._meta_view is not None else None
        if view is None:
            view = MetaView(self)
            self._meta_view = weakref.ref(view)
        return view

    @meta.setter
    def meta(self, meta: Mapping[str, Any] | None) -> None:
        if meta is None:
            self._clear_meta()
            return
        self.unprepare()
        W_q = self.W_q if self.W_q is not None else torch.empty(0)
        q = qtensor_from_meta(W_q, meta, check=self.W_q is not None)
        self._set_spec(q.spec)
        self._set_stats(q)
        known = {*meta_of(q, self._compute_dtype), "zero_scale", "channel_wise", "optimize", "round_zero"}
        self._extra_meta = {key: value for key, value in meta.items() if key not in known}

    @meta.deleter
    def meta(self) -> None:
        self._clear_meta()

    def _meta_dict(self) -> dict[str, Any]:
        if self._spec is None:
            return {}
        if self.prepared is not None:
            q = self.qtensor()
        else:
            W_q = getattr(self, "W_q", None)  # callers that free a layer delete it
            W_q = W_q if W_q is not None else torch.empty(0)
            q = QTensor(W_q, self._stat("scale"), self._stat("zero"), self._spec)
        meta = meta_of(q, self._compute_dtype)
        meta.update(self._extra_meta)
        return {
            key: value for key, value in meta.items() if value is not None or key not in ("scale", "zero")
        }

    def _delete_meta(self, key: str) -> None:
        if key in ("scale", "zero") and getattr(self, key) is not None:
            setattr(self, key, None)
        else:
            del self._extra_meta[key]

    # The tensors

    @property
    def ready(self) -> bool:
        """Whether the layer holds a quantised weight."""
        return self.is_initialized()

    def is_initialized(self) -> bool:
        """Whether the layer holds a quantised weight."""
        has_codes = self.prepared is not None or getattr(self, "W_q", None) is not None
        return has_codes and self._spec is not None

    def qtensor(self) -> QTensor:
        """Return the quantised weight, a copy if it is prepared; raises NotQuantizedError if there is none."""
        prepared = self.prepared
        if prepared is not None and "W_q" not in self._parameters:
            return prepared.to_qtensor()
        if self.W_q is None or self._spec is None:
            raise NotQuantizedError(
                f"got a {type(self).__name__} without a quantised weight; "
                "call initialize(), quantize(W, **quant_config) or load_state_dict(...) first"
            )
        return QTensor(self.W_q, self._stat("scale"), self._stat("zero"), self._spec)

    def stored_shape(self) -> tuple[int, ...]:
        """Return the shape of the whole weight; raises NotQuantizedError if there is none."""
        spec = self._spec if self.prepared is not None else None
        return (spec or self.qtensor().spec).shape

    def _stat(self, name: str) -> Any:
        quantized = self._quantized_stat(name)
        return getattr(self, name) if quantized is None else quantized.qtensor()

    def _quantized_stat(self, name: str) -> QuantizedMetadata | None:
        if self.prepared is not None and "W_q" not in self._parameters:
            stat = self.prepared.nested(name)
            return None if stat is None else QuantizedMetadata(stat)
        module = self._modules.get(f"{name}_quantized")
        return module if isinstance(module, QuantizedMetadata) else None

    def _set_stat(self, name: str, tensor: Tensor | None, quantized: QuantizedMetadata | None) -> None:
        """Make scale or zero (`name`) a tensor, or a module that holds it quantised, or nothing."""
        setattr(self, name, tensor)
        self._modules.pop(f"{name}_quantized", None)
        if quantized is not None:
            self.add_module(f"{name}_quantized", quantized)

    def _set_qtensor(self, q: QTensor) -> None:
        """Take over `q` on the layer's device, scale and zero in the compute dtype."""
        with self.as_codes():
            target = resolve_device(self._device)
            self.W_q = nn.Parameter(q.W_q.detach().to(target).contiguous(), requires_grad=False)
            self._set_spec(q.spec)
            self._set_stats(q)
            self.in_gpu = target.type == "cuda"

    def _set_spec(self, spec: QSpec) -> None:
        self._spec = spec
        self._selection = None

    def _set_stats(self, q: QTensor) -> None:
        target = self.W_q.device if self.W_q is not None else resolve_device(self._device)
        for name, stat in (("scale", q.scale), ("zero", q.zero)):
            if isinstance(stat, QTensor):
                self._set_stat(name, None, QuantizedMetadata(stat).to(target, self._compute_dtype))
            else:
                self._set_stat(name, stat.detach().to(target, self._compute_dtype).contiguous(), None)

    def _clear_meta(self) -> None:
        self.unprepare()
        view = self._meta_view() if self._meta_view is not None else None
        if view is not None:
            view.detach()
        self._meta_view = None
        self._spec = None
        self._selection = None
        self._extra_meta = {}
        for name in ("scale", "zero"):
            self._set_stat(name, None, None)

    def _scale_and_zero(self) -> tuple[Tensor, Tensor]:
        scale, zero = self._stat("scale"), self._stat("zero")
        if isinstance(scale, QTensor):
            scale = scale.dequantize(self._compute_dtype)
        if isinstance(zero, QTensor):
            zero = zero.dequantize(self._compute_dtype)
        return scale, zero

    def _prepared_spec(self) -> QSpec:
        """Return the description of what a backend would prepare; raises NotQuantizedError without a weight."""
        return self._spec if self.prepared is not None and self._spec is not None else self.qtensor().spec

    def _why_only_dequantized(self) -> str | None:
        """Return why no backend can prepare the weight as a whole, or None."""
        return None

    # Moving

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        with self.as_codes():
            self._apply_to_codes(fn, recurse)
        return self

    def _apply_to_codes(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
        # What becomes of an empty tensor is what becomes of the layer, also of one that has no weight yet.
        before = torch.empty(0, dtype=self._compute_dtype, device=self.device)
        moved = fn(before)
        dtype = check_compute_dtype(moved.dtype)
        W_q, fmt = self.W_q, self._spec.format if self._spec is not None else None
        if W_q is None or fmt is None or W_q.dtype == fmt.dtype:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        else:
            # Codes under a float dtype: a cast must not take them for numbers. The parameter stays the same object,
            # which an embedding may share.
            viewed_as = W_q.dtype
            W_q.data = W_q.data.view(fmt.dtype)
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            assert self.W_q is not None
            self.W_q.data = self.W_q.data.view(viewed_as)
        self._selection = None
        self._compute_dtype = dtype
        if self.W_q is not None or moved.device != before.device:
            self._device = moved.device
        self.in_gpu = self.W_q is not None and self.W_q.is_cuda

    def __getstate__(self) -> dict[str, Any]:
        # A view of the description belongs to its caller, and has no place in copies and pickles; nor has a prepared
        # weight, which belongs to this machine.
        return self._state_as_codes()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_preparation": None, **state})  # type: ignore[no-untyped-call]
        if self._preparation is not None:
            self._prepare_again(self._preparation)

    def cuda(self, device: DeviceLike | torch.dtype = None) -> QuantizedModule:
        """Move to `device` (any device, despite the name; default CUDA) and return self; a dtype means no move."""
        if isinstance(device, torch.dtype):
            return self
        return self.to(resolve_device("cuda" if device is None else device))

    def type(self, dst_type: Any) -> QuantizedModule:
        """Cast the compute dtype; codes keep theirs."""
        return self.to(dst_type)

    # Backends

    @classmethod
    def set_backend(cls, backend: HQQBackend) -> None:
        """Make `backend` the one that every layer of this class dequantises with, existing layers included."""
        try:
            cls.backend = HQQBackend(backend)
        except ValueError:
            names = ", ".join(f"HQQBackend.{member.name}" for member in HQQBackend)
            raise BackendError(f"got backend {backend!r}; expected one of {names}") from None

    def selection(self) -> Selection:
        """Return the backend this layer uses and, if it is not the one asked for, the reason."""
        if self._selection is not None and self._selected_for is self.backend:
            return self._selection
        q = self.qtensor()
        selection = select(self.backend.value, q.spec, self._compute_dtype, q.W_q.device)
        if not torch.compiler.is_compiling():  # a graph must not have the layer's attributes as a side effect
            self._selection, self._selected_for = selection, self.backend
        return selection

    def dequantize(self) -> Tensor:
        """Return the weight that the codes stand for, in the compute dtype."""
        q = self.qtensor()
        return self.selection().backend.dequantize(q.W_q, q.scale, q.zero, q.spec, self._compute_dtype)

    def unpack(self, reshape: bool = False, dtype: torch.dtype | None = None) -> Tensor | None:
        """Return the codes as the grouped matrix (or in the weight's shape) in `dtype` (default: compute dtype)."""
        if not self.is_initialized():
            return None
        q = self.qtensor()
        codes = q.codes(dtype or self._compute_dtype)
        return q.spec.grouping.ungroup(codes) if reshape else codes
