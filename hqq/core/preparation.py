"""What a layer does to multiply with a prepared weight, and to be an ordinary layer all the same."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hqq.core.backend import HQQBackend, Selection
from hqq.core.choice import Choice, choose
from hqq.core.metadata import QuantizedMetadata
from hqq.core.prepared import PreparedWeight
from hqq.core.qtensor import QSpec, QTensor
from hqq.errors import BackendError

if TYPE_CHECKING:
    from hqq.core.quantized_module import QuantizedModule

_logger = logging.getLogger(__name__)

_SLOT = "prepared_weight"
_WIRE = ("W_q", "scale", "zero")


@dataclass(frozen=True)
class Preparation:
    """What a layer was prepared for: by which name, what it got and why, and what it had before."""

    asked: str
    got: str
    reason: str | None
    keep_codes: bool
    backend_before: HQQBackend | None


class PreparedMixin(nn.Module):
    """The layer's `prepared` weight takes the place of W_q, scale and zero, which are made again when they are read.

    What is read from a prepared layer is a copy: assigning W_q or meta, unlike changing a copy in place, ends the
    preparation and changes the layer. Loading, moving and casting keep it.
    """

    _spec: QSpec | None
    _compute_dtype: torch.dtype
    _preparation: Preparation | None
    _selection: Selection | None
    backend: HQQBackend

    @property
    def prepared(self) -> PreparedWeight | None:
        """The weight in the form that a backend multiplies with, or None if the layer dequantises."""
        return self._modules.get(_SLOT)  # type: ignore[return-value]

    @property
    def preparation(self) -> Preparation | None:
        """What the layer was prepared for, or None."""
        return self._preparation

    def choice(self: QuantizedModule, asked: str, refused: tuple[tuple[str, str], ...] = ()) -> Choice:  # type: ignore[misc]
        """Return what `prepare(asked)` would give the layer, and why not a better backend."""
        spec, device = self._prepared_spec(), self.device
        return choose(
            asked,
            spec,
            self._compute_dtype,
            device,
            only_dequantize=self._why_only_dequantized(),
            refused=refused,
        )

    def prepare(self, asked: str, keep_codes: bool = False) -> Preparation:
        """Choose the backend that `asked` stands for, arrange the weight for it, and return what the layer got.

        keep_codes: keep W_q, scale and zero as well, because another module uses the same tensors. Raises
        NotQuantizedError without a weight. What the layer had before comes back with `unprepare`.
        """
        before = self._preparation
        own = vars(self).get("backend") if before is None else before.backend_before
        self._to_codes()
        refused: tuple[tuple[str, str], ...] = ()
        while True:
            choice = self.choice(asked, refused)  # type: ignore[misc]
            try:
                prepared = self._arranged(choice)  # type: ignore[misc]
                break
            except BackendError as error:
                refused = (*refused, (choice.got, str(error)))
        self._preparation = Preparation(asked, choice.got, choice.reason, keep_codes, own)
        self.backend = choice.dequant
        self._selection = None
        if prepared is not None:
            self.hold(prepared)
        else:
            self.selection()  # type: ignore[operator]  # chosen now: a graph that is being compiled cannot
        return self._preparation

    def _arranged(self: QuantizedModule, choice: Choice) -> PreparedWeight | None:  # type: ignore[misc]
        matmul = choice.matmul
        return None if matmul is None else matmul.prepare(self.qtensor(), self._compute_dtype)

    def hold(self, prepared: PreparedWeight) -> None:
        """Multiply with `prepared` from now on; the layer must have been prepared, and it must be the same weight.

        Raises BackendError for a layer that was not prepared, or a weight of another shape.
        """
        if self._preparation is None or self._spec is None:
            raise BackendError(
                "got a prepared weight for a layer that is not prepared; call prepare(...) first"
            )
        if prepared.spec.shape != self._spec.shape:
            raise BackendError(
                f"got a prepared weight of shape {prepared.spec.shape}; the layer's is {self._spec.shape}"
            )
        self._modules[_SLOT] = prepared
        if not self._preparation.keep_codes:
            self._parameters.pop("W_q", None)
            for name in ("scale", "zero"):
                self._buffers.pop(name, None)
                self._modules.pop(f"{name}_quantized", None)

    def codes_key(self) -> tuple[object, ...] | None:
        """Return what is equal for layers over the very same codes, and for no others; None without a weight.

        What is read from a prepared layer is a copy each time, so its address says nothing.
        """
        if self._modules.get(_SLOT) is not None and "W_q" not in self._parameters:
            return (id(self._modules[_SLOT]),)
        W_q = getattr(self, "W_q", None)
        if W_q is None:
            return None
        if W_q.is_meta or not W_q.numel():
            return (id(W_q),)
        return (W_q.data_ptr(), tuple(W_q.shape), W_q.device)

    def unprepare(self) -> None:
        """Bring codes, scale, zero and backend back to what they were before `prepare`; nothing if there was none."""
        before = self._preparation
        if before is None:
            return
        self._to_codes()
        self._preparation = None
        vars(self).pop("backend", None)
        if before.backend_before is not None:
            self.backend = before.backend_before
        self._selection = None

    @contextmanager
    def as_codes(self) -> Iterator[None]:
        """Within the context the layer holds its codes; what is done to them holds for the weight prepared again after.

        The backend is chosen again, as device, dtype or settings may have changed.
        """
        before = self._preparation
        self._to_codes()
        self._preparation = None
        try:
            yield
        finally:
            if before is not None:
                self._prepare_again(before)

    def _prepare_again(self, before: Preparation) -> None:
        self._preparation = before
        if not self.is_initialized():  # type: ignore[operator]
            return
        now = self.prepare(before.asked, before.keep_codes)
        if now.got != before.got:
            _logger.info("a layer prepared with %r now has %r: %s", before.got, now.got, now.reason)

    def _to_codes(self) -> None:
        prepared = self._modules.pop(_SLOT, None)
        if isinstance(prepared, PreparedWeight) and "W_q" not in self._parameters:
            for slot, name, value in _wire_entries(prepared.to_qtensor()):
                getattr(self, slot)[name] = value

    def _wire_copy(self, name: str) -> Any:
        """Return what W_q, scale or zero (`name`) would be without the preparation."""
        prepared = self.prepared
        assert prepared is not None
        q = prepared.to_qtensor()
        if name == "W_q":
            return nn.Parameter(q.W_q, requires_grad=False)
        stat = getattr(q, name)
        return stat if isinstance(stat, Tensor) else None

    def _state_as_codes(self) -> dict[str, Any]:
        """Return the layer's `__dict__` as if it held codes: copies and pickles go through the wire format."""
        state = {**vars(self), "_meta_view": None}
        prepared = self.prepared
        if prepared is None:
            return state
        for slot in ("_parameters", "_buffers", "_modules"):
            state[slot] = dict(state[slot])
        del state["_modules"][_SLOT]
        if "W_q" not in self._parameters:
            for slot, name, value in _wire_entries(prepared.to_qtensor()):
                state[slot][name] = value
        return state


def _wire_entries(q: QTensor) -> Iterator[tuple[str, str, Any]]:
    """Yield what a layer of codes keeps: (dict of nn.Module, name in it, value)."""
    yield "_parameters", "W_q", nn.Parameter(q.W_q.detach(), requires_grad=False)
    for name, stat in (("scale", q.scale), ("zero", q.zero)):
        nested = isinstance(stat, QTensor)
        yield "_buffers", name, None if nested else stat
        if nested:
            yield "_modules", f"{name}_quantized", QuantizedMetadata(stat)  # type: ignore[arg-type]
