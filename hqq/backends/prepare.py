"""prepare_for_inference: one backend for each quantised layer of a model, and a report that says which and why."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from hqq.core.backend import EAGER, HQQBackend, get_backend
from hqq.core.embedding import HQQEmbedding
from hqq.core.experts import HQQExperts
from hqq.core.modules import named_sites
from hqq.core.quantized_module import QuantizedModule
from hqq.errors import BackendError

_logger = logging.getLogger(__name__)

# Name -> what a layer is given, best first; the reference takes every layer, so "default" never comes out empty.
_CANDIDATES: dict[str, tuple[HQQBackend, ...]] = {
    "default": (HQQBackend.TRITON, HQQBackend.PYTORCH),
    **{backend.value: (backend,) for backend in HQQBackend},
}

# The attribute of a prepared layer with the backend it had of its own before, or None.
_BEFORE = "backend_before_preparation"


@dataclass(frozen=True)
class LayerPreparation:
    """The backend that was asked for and that one layer got; `reason` says why it is not a better one."""

    layer: str
    asked: str
    got: str
    reason: str | None = None

    @property
    def fulfilled(self) -> bool:
        """Whether the layer has what was asked for."""
        return self.asked in ("default", self.got)


@dataclass(frozen=True)
class PreparationReport:
    """What `prepare_for_inference` gave each quantised layer. `str` sums it up, by backend and reason."""

    asked: str
    layers: tuple[LayerPreparation, ...]

    @property
    def missed(self) -> tuple[LayerPreparation, ...]:
        """The layers that did not get what was asked for."""
        return tuple(row for row in self.layers if not row.fulfilled)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return asdict(self)

    def __str__(self) -> str:
        counts: dict[tuple[str, str | None], int] = {}
        for row in self.layers:
            counts[row.got, row.reason] = counts.get((row.got, row.reason), 0) + 1
        lines = [f"asked for {self.asked!r}: {len(self.layers)} quantised layers"]
        lines += [
            f"{count} with {got!r}" + (f": {reason}" if reason else "")
            for (got, reason), count in counts.items()
        ]
        return "\n".join(lines)


def prepare_for_inference(
    model: nn.Module,
    allow_merge: bool = False,
    backend: str = "default",
    verbose: bool = False,
    strict: bool = False,
) -> PreparationReport:
    """Choose the backend of every quantised layer of `model` and return a report.

    The choice holds for the layers themselves, whatever `HQQLinear.set_backend` says; their forward passes then compile
    without a graph break. Weights, state_dict and layer classes stay as they are, and `restore` undoes it.

    Args:
        model: may be a quantised layer itself; layers inside adapters count too.
        allow_merge: permits merging zeros into adapters, as the original's kernels for symmetric codes did; none of
            these backends does that, so it makes no difference.
        backend: "default" (the Triton kernels where they run, else torch), "pytorch", "pytorch_compile" or "triton".
        verbose: log the report, at level INFO.
        strict: raise if a layer does not get `backend`; "default" takes what there is.

    Raises BackendError for an unknown backend, for a model without quantised layers, and under `strict`; the model is
    then as it was.
    """
    if backend not in _CANDIDATES:
        raise BackendError(
            f"got backend={backend!r}, which this version of hqq does not have; expected one of "
            f"{', '.join(map(repr, _CANDIDATES))}"
        )
    layers = quantized_layers(model)
    if not layers:
        raise BackendError(
            f"got {type(model).__name__} without quantised layers; quantise it, or load it quantised"
        )
    chosen = {name: _choose(layer, backend) for name, layer in layers.items()}
    rows = tuple(LayerPreparation(name, backend, got.value, reason) for name, (got, reason) in chosen.items())
    report = PreparationReport(backend, rows)
    if strict and report.missed:
        first = report.missed[0]
        raise BackendError(
            f"got {len(report.missed)} of {len(rows)} layers that cannot use {backend!r}, first {first.layer}: "
            f"{first.reason}; use strict=False to let them use {first.got!r}"
        )
    for name, layer in layers.items():
        _set(layer, chosen[name][0])
    if verbose:
        _logger.info("%s", report)
    return report


def restore(model: nn.Module) -> nn.Module:
    """Undo `prepare_for_inference` and return `model`."""
    for layer in quantized_layers(model).values():
        if _BEFORE in vars(layer):
            before = vars(layer).pop(_BEFORE)
            vars(layer).pop("backend", None)
            if before is not None:
                layer.backend = before
    return model


def quantized_layers(model: nn.Module) -> dict[str, QuantizedModule]:
    """Return the layers of `model` that multiply by a quantised weight, by name.

    Embeddings are none of them: they look rows up, and no backend has a part in that.
    """
    return {
        names[0]: module
        for module, names in named_sites(model).items()
        if isinstance(module, QuantizedModule)
        and not isinstance(module, HQQEmbedding)
        and module.is_initialized()
    }


def _choose(layer: QuantizedModule, asked: str) -> tuple[HQQBackend, str | None]:
    """Return the best backend among those that `asked` stands for, and why not a better one."""
    reasons: list[str] = []
    for candidate in _CANDIDATES[asked]:
        reason = _refusal(layer, candidate)
        if reason is None:
            return candidate, reasons[0] if reasons else None
        reasons.append(reason)
    return HQQBackend(EAGER.name), reasons[0]


def _refusal(layer: QuantizedModule, candidate: HQQBackend) -> str | None:
    """Return why `candidate` cannot serve `layer`, or None."""
    q = layer.expert(0) if isinstance(layer, HQQExperts) else layer.qtensor()
    backend = get_backend(candidate.value)
    return backend.available() or backend.supports(q.spec, layer.compute_dtype, q.device)


def _set(layer: QuantizedModule, backend: HQQBackend) -> None:
    if _BEFORE not in vars(layer):
        setattr(layer, _BEFORE, vars(layer).get("backend"))
    layer.backend = backend
    layer.selection()  # chosen now: a graph that is being compiled cannot
