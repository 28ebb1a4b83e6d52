"""prepare_for_inference: one backend for each quantised layer of a model, and a report that says which and why."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from hqq.backends.merge import Merge, merge_projections
from hqq.core.choice import check_asked, satisfies
from hqq.core.embedding import HQQEmbedding
from hqq.core.modules import named_sites
from hqq.core.preparation import Preparation
from hqq.core.quantized_module import QuantizedModule
from hqq.errors import BackendError

_logger = logging.getLogger(__name__)


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
        return satisfies(self.asked, self.got)


@dataclass(frozen=True)
class PreparationReport:
    """What `prepare_for_inference` gave each quantised layer. `str` sums it up, by backend and reason.

    merges: what became of each group of projections that share an input, if merging them was allowed.
    """

    asked: str
    layers: tuple[LayerPreparation, ...]
    merges: tuple[Merge, ...] = ()

    @property
    def missed(self) -> tuple[LayerPreparation, ...]:
        """The layers that did not get what was asked for."""
        return tuple(row for row in self.layers if not row.fulfilled)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return asdict(self)

    def __str__(self) -> str:
        counts = Counter((row.got, row.reason) for row in self.layers)
        lines = [f"asked for {self.asked!r}: {len(self.layers)} quantised layers"]
        lines += [
            f"{count} with {got!r}" + (f": {reason}" if reason else "")
            for (got, reason), count in counts.items()
        ]
        groups = Counter(row.reason for row in self.merges)
        lines += [
            f"{count} groups of projections " + (f"left apart: {reason}" if reason else "joined")
            for reason, count in groups.items()
        ]
        return "\n".join(lines)


def prepare_for_inference(
    model: nn.Module,
    allow_merge: bool = False,
    backend: str = "default",
    verbose: bool = False,
    strict: bool = False,
) -> PreparationReport:
    """Choose how every quantised layer of `model` multiplies, arrange its weight for that, and return a report.

    Layers keep their class, and state_dict, W_q, meta and dequantize() give what they gave before: codes that a backend
    has arranged in its own way are brought back whenever they are asked for, bit for bit. Moving, casting, loading and
    copying work as ever, and choose again. The choice holds for the layers themselves, whatever `HQQLinear.set_backend`
    says. `restore` undoes it all, and preparing for another backend replaces it.

    Args:
        model: may be a quantised layer itself; layers inside adapters count too.
        allow_merge: keep the weights of query, key and value projections, and of gate and up projections, one behind
            the other in memory where they are native, so that HFGenerator multiplies with all of them at once. Exact;
            HFGenerator does it itself otherwise.
        backend: "default" or "auto" (the best for each layer: on CUDA "native", where its kernels do not take the layer
            "triton"; on the CPU "cpu"; else "pytorch"), or one of
            "native": fused kernels (8 to 1 bit, both axes, fp16 and bf16);
            "triton": "native" where it can be, else Triton's dequantisation and torch's product;
            "pytorch", "pytorch_compile": the reference, or the reference compiled, and torch's product;
            "torchao_int4": torch's int4 product on CUDA (bf16, axis 1);
            "gemlite", "marlin", "bitblas": kernels of the library of that name;
            "cpu": torch's int4 and int8 products on the CPU (bf16, axis 1).
        verbose: log the report, at level INFO.
        strict: raise if a layer does not get `backend`; "default" takes what there is.

    A layer that its backend does not take gets the best one that does, and the report says why. Raises BackendError for
    an unknown backend, for one whose library is not there, for a model without quantised layers, and under `strict`;
    the model is then as it was.
    """
    check_asked(backend)
    layers = quantized_layers(model)
    if not layers:
        raise BackendError(
            f"got {type(model).__name__} without quantised layers; quantise it, or load it quantised"
        )
    if strict:
        choices = {name: layer.choice(backend) for name, layer in layers.items()}
        _check(_report(backend, {name: (c.got, c.reason) for name, c in choices.items()}))
    report = _prepare(model, layers, backend, strict)
    if allow_merge:
        report = replace(report, merges=merge_projections(model))
    if verbose:
        _logger.info("%s", report)
    return report


def _prepare(
    model: nn.Module, layers: dict[str, QuantizedModule], backend: str, strict: bool
) -> PreparationReport:
    before = {layer: layer.preparation for layer in layers.values()}
    shared = _with_shared_codes(model)
    done: dict[str, Preparation] = {}
    try:
        for name, layer in layers.items():
            done[name] = layer.prepare(backend, keep_codes=layer in shared)
        report = _report(backend, {name: (row.got, row.reason) for name, row in done.items()})
        if strict:
            _check(report)
    except Exception:
        for layer, preparation in before.items():
            layer.unprepare()
            if preparation is not None:
                layer.prepare(preparation.asked, preparation.keep_codes)
        raise
    return report


def _report(asked: str, rows: dict[str, tuple[str, str | None]]) -> PreparationReport:
    return PreparationReport(asked, tuple(LayerPreparation(name, asked, *row) for name, row in rows.items()))


def _check(report: PreparationReport) -> None:
    if report.missed:
        first = report.missed[0]
        raise BackendError(
            f"got {len(report.missed)} of {len(report.layers)} layers that cannot use {report.asked!r}, first "
            f"{first.layer}: {first.reason}; use strict=False to let them use {first.got!r}"
        )


def restore(model: nn.Module) -> nn.Module:
    """Undo `prepare_for_inference` and return `model`."""
    for layer in quantized_layers(model).values():
        layer.unprepare()
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


def _with_shared_codes(model: nn.Module) -> set[QuantizedModule]:
    """Return the layers whose codes another layer or an embedding of `model` uses too."""
    users: dict[int, list[QuantizedModule]] = {}
    for module in named_sites(model):
        codes = module._parameters.get("W_q") if isinstance(module, QuantizedModule) else None
        if isinstance(module, QuantizedModule) and codes is not None:
            users.setdefault(id(codes), []).append(module)
    return {module for modules in users.values() if len(modules) > 1 for module in modules}
