"""Calibrating a model: part by part, each with what precedes it already quantised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hqq.core.modules import find_module
from hqq.models.calibration.chain import find_chain
from hqq.models.calibration.moments import tokens_needed
from hqq.models.calibration.parts import Parts
from hqq.models.calibration.resume import WorkFolder, describe
from hqq.models.calibration.settings import Calibration
from hqq.models.calibration.sites import Site, site_of
from hqq.models.calibration.text import batches_of, check_enough, tokens_for
from hqq.models.calibration.units import BlockUnit, ModelUnit, Unit
from hqq.models.placement import Placement, follow_inputs, settle_tensors
from hqq.models.plan import Job
from hqq.models.progress import progress_bar
from hqq.models.report import LayerRow


@torch.no_grad()
def calibrate(
    model: nn.Module,
    jobs: Sequence[Job],
    placement: Placement,
    compute_dtype: torch.dtype | None,
    settings: Calibration,
    progress: bool,
    errors: bool,
) -> list[LayerRow]:
    """Quantise the weights of `jobs` with the inputs that `settings` ask for, and return their rows of the report.

    Fused experts are parameters of `model` here. Until a part is finished its layers compute with the dequantised
    weights, in the model's own dtype. Raises ConfigError for data that does not suit the model or is too little,
    WeightError for activations that are not finite, CheckpointError for a work folder of something else.
    """
    description = describe(model, jobs, compute_dtype, settings) if settings.folder is not None else {}
    folder = WorkFolder(settings.folder, description)
    _bring(model, placement)
    sites = [site_of(model, job) for job in jobs]
    widest = max((site.weight.shape[-1] for site in sites if site.layers and not site.routed), default=0)
    with _as_it_predicts(model, sites) as modes:
        tokens = folder.tokens()
        if tokens is None:
            tokens = tokens_for(model, settings, widest, progress)
            if tokens is not None:
                check_enough(tokens, tokens_needed(widest), widest)
                folder.keep_tokens(tokens)
        batches = batches_of(model, settings, tokens)
        chain = find_chain(model, [site.name for site in sites], batches)
        with progress_bar(len(sites), "Calibrating", progress) as bar:
            run = Parts(model, settings, placement, compute_dtype, errors, folder, modes, bar)
            run.kept = [batch.kept for batch in batches]
            if chain is None:
                nothing = [torch.empty(0)] * len(batches)
                run.part(0, ModelUnit(model, batches), sites, nothing, nothing)
            else:
                full = quant = chain.hidden
                for i, (name, block) in enumerate(zip(chain.names, chain.blocks, strict=True)):
                    unit = BlockUnit(name, block, chain.calls[i], placement)
                    full, quant = run.part(i, unit, _within(sites, unit), full, quant)
                rest = [site for site in sites if site.name not in run.rows]
                if rest:
                    run.part(len(chain.names), ModelUnit(model, batches, chain), rest, full, quant)
    return [row for site in sites for row in run.rows[site.name]]


def _within(sites: Sequence[Site], unit: Unit) -> list[Site]:
    return [site for site in sites if site.name.startswith(unit.prefix)]


def _bring(model: nn.Module, placement: Placement) -> None:
    """Put the model where it is to run: spread out, or on its device if that has room for all of it."""
    if placement.is_spread:
        settle_tensors(model, placement, None)
        follow_inputs(model, placement)
        return
    target = placement.device_of("")
    if target is None:
        return
    if target.type == "cuda":
        away = sum(p.nbytes for p in model.parameters() if p.device != target)
        if away and away > _SHARE_OF_MEMORY * torch.cuda.mem_get_info(target)[0]:
            return
    model.to(target)


# The rest is for activations, the cache of the text that is written, and the moments of a block.
_SHARE_OF_MEMORY = 0.8


@contextmanager
def _as_it_predicts(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[nn.Module, bool]]:
    """Within the context the model is in evaluation mode, and computes experts one by one; yields the modes it had."""
    modes = {module: module.training for module in model.modules()}
    owners = [find_module(model, site.name.rpartition(".")[0]) for site in sites if site.experts is not None]
    configs: list[Any] = [getattr(owner, "config", None) for owner in owners]
    ways = [(c, c._experts_implementation) for c in configs if hasattr(c, "_experts_implementation")]
    model.eval()
    try:
        for config, _ in ways:
            config._experts_implementation = "eager"
        yield modes
    finally:
        for config, way in reversed(ways):
            config._experts_implementation = way
        for module, mode in modes.items():
            module.training = mode
