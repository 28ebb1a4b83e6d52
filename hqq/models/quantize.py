"""quantize_model: replace the linear layers of any model by quantised ones, in place."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from hqq.core.experts import experts_as_modules
from hqq.core.linear import HQQLinear
from hqq.core.modules import linear_tag, name_modules, named_sites
from hqq.core.solvers import DEFAULT_SOLVER
from hqq.errors import ConfigError
from hqq.models.calibration.run import calibrate
from hqq.models.calibration.settings import CalibrationLike, as_calibration
from hqq.models.candidates import avoid_fused_paths
from hqq.models.install import install, main_member, quantized, relative_error
from hqq.models.late_checks import LateChecks
from hqq.models.layer_choice import ConfigChooser, ModelConfig
from hqq.models.placement import DeviceMap, Placement, follow_inputs, plan_placement, settle_tensors
from hqq.models.plan import Job, Plan, make_plan
from hqq.models.preflight import ErrorsName, check_jobs, resolved_solver
from hqq.models.progress import progress_bar
from hqq.models.quantization_config import attach_config, describe_model
from hqq.models.report import LayerRow, QuantizationReport, stored_bytes
from hqq.models.streaming import WeightStream, is_streamed, on_device

# Weights that may be copied ahead: a block's small layers.
_LOOK_AHEAD = 4


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    config: ModelConfig,
    *,
    compute_dtype: torch.dtype | None = None,
    device: DeviceMap = None,
    skip: Sequence[str] = ("lm_head",),
    embeddings: bool = False,
    lm_head: bool = False,
    progress: bool = True,
    errors: bool = False,
    calibration: CalibrationLike = None,
) -> QuantizationReport:
    """Quantise the linear layers and fused experts of `model` in place and return what was done.

    Args:
        model: any nn.Module that contains nn.Linear layers.
        config: QuantConfig or nested dict for all layers, or {layer name, tag or glob: config or None}; see
            `ConfigChooser`.
        compute_dtype: dtype that quantised layers compute in, and that the rest of the model is cast to; None keeps
            each layer's own dtype.
        device: None leaves the model where it is; a device; a list of devices to spread the blocks over; or
            {module name: device}.
        skip: names, parts of names or globs of layers to leave; see `skip_rule`. A config for a layer's very name or
            tag wins over it.
        embeddings: also quantise nn.Embedding.
        lm_head: also quantise the output head (together with the embedding, if they share their weight).
        progress: show a progress bar on a terminal.
        errors: measure each layer's relative error (one more pass over each weight).
        calibration: None needs no data. "self": a language model writes text, and each layer is fitted to the inputs
            that it sees there, errors of the layers before it included; "random": the same with random tokens; or the
            caller's data, or a `Calibration` with all settings. See docs/solver.md.

    Every layer is checked before the first is changed, except that NaN and infinity in weights that go from the CPU to
    a GPU are found when it is their turn, and values beyond compute_dtype's largest when a weight has been solved.
    Memory stays below the model and one layer: a weight is freed when its codes exist. Raises ConfigError (nothing to
    quantise, already quantised, a group size that does not divide, patterns that fit nothing, calibration data that is
    too little or does not suit the model), WeightError, DtypeError or ShapeError, which name the layer. Calibration
    that ends in an error leaves the blocks before it quantised; with a folder, a fresh copy of the model goes on.
    """
    start = time.perf_counter()
    settings = as_calibration(calibration)
    _refuse(model)
    weights = sum(p.numel() for p in model.parameters())
    with experts_as_modules(model):
        plan = make_plan(model, ConfigChooser(config), skip, embeddings, lm_head)
        if not plan.jobs:
            raise ConfigError(f"got a {type(model).__name__} with no layer to quantise: {_reasons(plan)}")
        placement = plan_placement(model, device)
        # A model that is to run needs all its weights to be finite before it starts.
        check_jobs(plan.jobs, compute_dtype, placement if settings is None else Placement({}))
        if settings is None:
            rows = _quantize_jobs(model, plan, placement, compute_dtype, progress, errors)
    if settings is not None:
        rows = calibrate(model, plan.jobs, placement, compute_dtype, settings, progress, errors)
    settle_tensors(model, placement, compute_dtype)
    finish_model(model)
    if settings is None:
        follow_inputs(model, placement)
    attach_config(model, describe_model(model, skip))
    return QuantizationReport(
        tuple(rows), tuple(plan.left), weights, stored_bytes(model), time.perf_counter() - start
    )


def finish_model(model: nn.Module) -> None:
    """Set what a quantised model carries: names, linear_tags, hqq_quantized."""
    avoid_fused_paths(model)
    name_modules(model)
    model.linear_tags = layer_tags(model)  # type: ignore[assignment]
    model.hqq_quantized = True  # type: ignore[assignment]


def layer_tags(model: nn.Module, ignore: Sequence[str] = ("lm_head",)) -> list[str]:
    """Return the tags of the linear layers of `model`, quantised or not, without those whose last name is ignored."""
    names = [
        names[0]
        for module, names in named_sites(model).items()
        if isinstance(module, (nn.Linear, HQQLinear)) and names[0]
    ]
    return list(dict.fromkeys(linear_tag(name) for name in names if name.rpartition(".")[2] not in ignore))


def _refuse(model: nn.Module) -> None:
    if isinstance(model, nn.Linear):
        raise ConfigError(
            "got a bare nn.Linear as the model, which cannot be replaced in place; use "
            "HQQLinear(layer, quant_config), or wrap it: nn.Sequential(layer)"
        )
    if getattr(model, "hqq_quantized", False):
        raise ConfigError(
            f"got a {type(model).__name__} that is already quantised; load the original model to quantise it otherwise"
        )


def _reasons(plan: Plan) -> str:
    reasons = dict.fromkeys(f"{row.name} ({row.kind}): {row.reason}" for row in plan.left)
    shown = list(reasons)[:5]
    return (
        "; ".join(shown) + (f"; and {len(reasons) - 5} more" if len(reasons) > 5 else "")
        if shown
        else "it has none"
    )


def _quantize_jobs(
    model: nn.Module,
    plan: Plan,
    placement: Placement,
    compute_dtype: torch.dtype | None,
    progress: bool,
    errors: bool,
) -> list[LayerRow]:
    rows: list[LayerRow] = []
    # Taken off one by one: a job that stayed in the list would keep its weight alive.
    jobs = deque(plan.jobs)
    plan.jobs.clear()
    with (
        progress_bar(len(jobs), "Quantising", progress) as bar,
        WeightStream() as stream,
        LateChecks() as checks,
    ):
        _look_ahead(stream, jobs, placement)
        while jobs:
            job = jobs.popleft()
            # Of a weight that is copied there must not be too many at once, so the host keeps in step with the GPU.
            resident = not is_streamed(_weight(job), placement.device_of(job.name))
            with checks.of(job.name, resident), ErrorsName(job.name), on_device(stream, _weight(job)):
                _look_ahead(stream, jobs, placement)
                rows += _quantize_job(model, job, placement.device_of(job.name), compute_dtype, errors)
            bar.update()
    return rows


def _look_ahead(stream: WeightStream, jobs: deque[Job], placement: Placement) -> None:
    for job in islice(jobs, _LOOK_AHEAD):
        stream.prepare(_weight(job), placement.device_of(job.name))


def _weight(job: Job) -> Tensor:
    weight = main_member(job).module.weight
    assert isinstance(weight, Tensor)
    return weight


def _quantize_job(
    model: nn.Module, job: Job, device: torch.device | None, compute_dtype: torch.dtype | None, errors: bool
) -> list[LayerRow]:
    """Quantise one weight and replace every module that uses it."""
    start = time.perf_counter()
    main, weight = main_member(job), _weight(job)
    dtype, target = compute_dtype or weight.dtype, device or weight.device
    kept = weight.detach() if errors else None
    del weight
    layer = quantized(main.module, resolved_solver(job.config, DEFAULT_SOLVER), dtype, target)
    error = relative_error(kept, layer) if kept is not None else None
    return install(model, job, layer, error, time.perf_counter() - start)
