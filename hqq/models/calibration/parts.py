"""Calibrating one part of a model: stage by stage, each with what precedes it already quantised."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hqq.core.config import QuantConfig
from hqq.core.experts import HQQExperts, replace_parameter
from hqq.core.linear import HQQLinear
from hqq.core.modules import find_module
from hqq.core.quantized_module import QuantizedModule
from hqq.core.solvers import DEFAULT_SOLVER
from hqq.models.calibration.moments import Moments
from hqq.models.calibration.record import Enough
from hqq.models.calibration.resume import WorkFolder
from hqq.models.calibration.settings import Calibration
from hqq.models.calibration.sites import Site, Stage, recorder, stages_of
from hqq.models.calibration.units import Unit
from hqq.models.calibration.watch import Watch, rows_of
from hqq.models.calibration.weights import Inputs, Outcome, refine
from hqq.models.install import as_shared, install, layer_row, main_member, quantized, relative_error
from hqq.models.placement import Placement
from hqq.models.preflight import ErrorsName, resolved_solver
from hqq.models.report import LayerRow

_UNSEEN = "no input reached it"


@dataclass
class Done:
    """A quantised layer that waits to take its place, and what the report says of it."""

    layer: QuantizedModule
    outcome: Outcome
    error: float | None
    seconds: float

    def state(self) -> dict[str, Any]:
        """Return tensors and plain values that describe it."""
        return {
            "layer": {key: value.cpu() for key, value in self.layer.state_dict().items()},
            "outcome": asdict(self.outcome),
            "error": self.error,
            "seconds": self.seconds,
        }


def _compute_with(site: Site, layer: QuantizedModule) -> None:
    """Let the model compute with the weight that `layer` stands for."""
    site.weight.data = layer.dequantize().to(site.weight)


def _experts(
    weight: Tensor, config: QuantConfig, dtype: torch.dtype, inputs: dict[int | None, Inputs]
) -> tuple[HQQExperts, Outcome]:
    """Return the quantised form of fused experts [E, N, K], each calibrated by its own tokens, and their sums."""
    layers, total, reasons = [], Outcome(), {}
    for index, W in enumerate(weight):
        layer = HQQLinear.from_weights(W, None, config.to_dict(), dtype, weight.device)
        found = inputs.get(index)
        outcome = refine([layer], [W], config, found)[0] if found else Outcome(fallback=_UNSEEN)
        if outcome.fallback is not None:
            reasons[index] = outcome.fallback
        total.before += outcome.before
        total.after += outcome.after
        total.square += outcome.square
        layers.append(layer)
    if reasons:
        first = next(iter(reasons))
        total.fallback = f"{len(reasons)} of {len(weight)} experts, such as {first}: {reasons[first]}"
        if not inputs:
            total.fallback = "its inputs were not seen: the model multiplies with it in a way of its own"
    experts = HQQExperts(weight.shape, dtype, weight.device)
    experts._stack(layers)
    return experts, total


class Parts:
    """What all parts of the model share, and the rows of the weights that are done."""

    def __init__(
        self,
        model: nn.Module,
        settings: Calibration,
        placement: Placement,
        compute_dtype: torch.dtype | None,
        errors: bool,
        folder: WorkFolder,
        modes: dict[nn.Module, bool],
        bar: Any,
    ) -> None:
        self.rows: dict[str, list[LayerRow]] = {}
        self.kept: list[Tensor | None] = []
        self._model, self._settings, self._compute_dtype = model, settings, compute_dtype
        self._placement = placement
        self._errors, self._folder, self._modes, self._bar = errors, folder, modes, bar

    def part(
        self, index: int, unit: Unit, sites: list[Site], full: list[Tensor], quant: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Calibrate `sites`, those within `unit`, and return its outputs for the full and the quantised model.

        full, quant: its inputs, one for each batch.
        """
        unit.prepare()
        kept = self._folder.part(index)
        if kept is not None:
            full = [unit.run(i, hidden) for i, hidden in enumerate(full)]
            done = {site.name: self._restored(site, kept[site.name]) for site in sites}
            for site in sites:
                _compute_with(site, done[site.name].layer)
        else:
            full, done = self._calibrated(unit, sites, full, quant)
            self._folder.keep_part(index, {name: entry.state() for name, entry in done.items()})
        quant = [unit.run(i, hidden) for i, hidden in enumerate(quant)]
        for site in sites:
            self._install(site, done[site.name])
        return full, quant

    def _calibrated(
        self, unit: Unit, sites: list[Site], full: list[Tensor], quant: list[Tensor]
    ) -> tuple[list[Tensor], dict[str, Done]]:
        watch = Watch(sites, self.kept)
        full = watch.run(unit, full)
        done: dict[str, Done] = {}
        for stage in stages_of(sites, watch.trace):
            inputs = self._inputs(unit, stage, watch, quant)
            for together in stage.groups():
                found = inputs[stage.leaders[together[0].name]]
                done.update(self._quantise(together, found))
        for site in sites:
            if site.name not in done:
                done.update(self._quantise([site], {}))
        return full, done

    def _inputs(
        self, unit: Unit, stage: Stage, watch: Watch, quant: list[Tensor]
    ) -> dict[str, dict[int | None, Inputs]]:
        """Return the inputs of a stage's leaders, by number of the expert where they are those of experts."""
        moments: dict[str, dict[int | None, Moments]] = {site.name: {} for site in stage.recorded()}
        for i, hidden in enumerate(quant):
            calls: dict[str, int] = {}

            def see(
                name: str, x: Tensor, expert: int | None, i: int = i, calls: dict[str, int] = calls
            ) -> None:
                rows = rows_of(x, self.kept[i])
                found = moments[name].setdefault(expert, Moments(rows.shape[1], rows.device))
                found.add(rows, watch.seen(name, i, calls.get(name, 0)))
                calls[name] = calls.get(name, 0) + 1

            with recorder(stage.recorded(), see, stage.last), suppress(Enough):
                unit.run(i, hidden)
        inputs: dict[str, dict[int | None, Inputs]] = {}
        for name, found in moments.items():
            watch.forget(name)
            with ErrorsName(name):
                inputs[name] = {key: Inputs(value, self._settings) for key, value in found.items()}
        return inputs

    def _quantise(self, sites: list[Site], inputs: dict[int | None, Inputs]) -> dict[str, Done]:
        """Quantise the weights of sites that share their input and configuration, and compute with the result."""
        start = time.perf_counter()
        weights = [site.weight.detach() for site in sites]
        config = resolved_solver(sites[0].job.config, DEFAULT_SOLVER)
        found: list[tuple[QuantizedModule, Outcome]]
        if sites[0].layers:
            found = self._linears(sites, weights, config, inputs.get(None))
        else:
            with ErrorsName(sites[0].name):
                if sites[0].experts is None:
                    found = [self._embedding(sites[0], config)]
                else:
                    found = [_experts(weights[0], config, self._dtype(weights[0]), inputs)]
        seconds = (time.perf_counter() - start) / len(sites)
        done = {}
        for site, weight, (layer, outcome) in zip(sites, weights, found, strict=True):
            error = relative_error(weight, layer) if self._errors else None
            _compute_with(site, layer)
            self._bar.update()
            done[site.name] = Done(layer, outcome, error, seconds)
        return done

    def _dtype(self, weight: Tensor) -> torch.dtype:
        return self._compute_dtype or weight.dtype

    def _embedding(self, site: Site, config: QuantConfig) -> tuple[QuantizedModule, Outcome]:
        module, weight = main_member(site.job).module, site.weight
        layer = quantized(module, config, self._dtype(weight), weight.device)
        return layer, Outcome(fallback="an embedding looks rows up, and has no inputs to calibrate with")

    def _linears(
        self, sites: list[Site], weights: list[Tensor], config: QuantConfig, inputs: Inputs | None
    ) -> list[tuple[QuantizedModule, Outcome]]:
        layers: list[HQQLinear] = []
        for site, weight in zip(sites, weights, strict=True):
            bias = getattr(main_member(site.job).module, "bias", None)
            with ErrorsName(site.name):
                dtype = self._dtype(weight)
                layers.append(HQQLinear.from_weights(weight, bias, config.to_dict(), dtype, weight.device))
        unseen = [Outcome(fallback=_UNSEEN) for _ in layers]
        outcomes = refine(layers, weights, config, inputs) if inputs is not None else unseen
        return list(zip(layers, outcomes, strict=True))

    def _restored(self, site: Site, state: dict[str, Any]) -> Done:
        weight = site.weight
        dtype = self._compute_dtype or weight.dtype
        if site.experts is not None:
            layer: QuantizedModule = HQQExperts(weight.shape, dtype, weight.device)
        elif not site.layers:
            return self._quantise([site], {})[site.name]
        else:
            layer = HQQLinear(None, None, compute_dtype=dtype, device=weight.device)
        layer.load_state_dict(state["layer"])
        self._bar.update()
        return Done(layer, Outcome(**state["outcome"]), state["error"], state["seconds"])

    def _install(self, site: Site, done: Done) -> None:
        job, target = site.job, self._placement.device_of(site.name)
        if target is not None and done.layer.device != target:
            done.layer.to(target)
        if site.experts is not None:
            owner, _, leaf = site.name.rpartition(".")
            module = find_module(self._model, owner)
            assert module is not None and isinstance(done.layer, HQQExperts)
            replace_parameter(module, leaf, done.layer)
            rows = as_shared(
                [layer_row(site.name, "experts", done.layer, done.error, done.seconds)], site.name
            )
        else:
            for member in job.members:
                member.module.training = self._modes[member.module]
            rows = install(self._model, job, done.layer, done.error, done.seconds)
        # Jobs outlive their layers; the weights must not.
        for member in job.members:
            member.module._parameters["weight"] = None
        site.experts = None
        before, after = done.outcome.relative() or (None, None)
        fallback = done.outcome.fallback
        self.rows[site.name] = [
            replace(row, output_error_before=before, output_error=after, fallback=fallback) for row in rows
        ]
