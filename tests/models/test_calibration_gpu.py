"""Calibration on a GPU: the kernel is used, the result is as good as the CPU's, and all ends where it is placed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from hqq import Calibration, HQQLinear, QuantConfig, quantize_model
from hqq.core.solvers import feedback_round
from hqq.kernels import feedback
from hqq.models.calibration import run as calibration_run
from hqq.models.report import QuantizationReport
from tests.models.test_calibration import mixtral
from tests.models.zoo import llama, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

CONFIG = QuantConfig(nbits=3, group_size=16)


def tokens(rng: torch.Generator) -> Calibration:
    return Calibration(torch.randint(3, 96, (8, 48), generator=rng))


def total_error(report: QuantizationReport) -> float:
    return sum(row.output_error or 0.0 for row in report.layers)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_as_good_as_on_the_cpu(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, axis: int, kind: str
) -> None:
    model = llama(rng)[0].eval() if kind == "llama" else mixtral()
    twin, calibration = copy.deepcopy(model), tokens(rng)
    config = QuantConfig(nbits=3, group_size=16, axis=axis)
    expected = quantize_model(twin, config, calibration=calibration, progress=False)
    launches: list[int] = []
    launch = feedback.round_columns

    def counted(columns: Tensor, *args: Tensor) -> None:
        launches.append(len(columns))
        launch(columns, *args)

    monkeypatch.setattr(feedback, "round_columns", counted)
    assert feedback_round._MODULES["cuda"] == feedback.__name__
    found = quantize_model(model, config, calibration=calibration, device="cuda", progress=False)
    assert launches
    # Rounding differs at ties, which later columns and layers follow: single codes change, their quality does not.
    assert total_error(found) == pytest.approx(total_error(expected), rel=0.1)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert {m.device.type for m in model.modules() if isinstance(m, HQQLinear)} == {"cuda"}


def test_a_model_too_large_for_the_gpu_goes_there_block_by_block(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = llama(rng)
    twin, calibration = copy.deepcopy(model.eval()), tokens(rng)
    monkeypatch.setattr(calibration_run, "_SHARE_OF_MEMORY", 0.0)
    options = {"calibration": calibration, "device": "cuda", "lm_head": True, "progress": False}
    report = quantize_model(model, CONFIG, **options)
    monkeypatch.undo()
    expected = quantize_model(twin, CONFIG, **options)
    assert total_error(report) == pytest.approx(total_error(expected), rel=0.1)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    ids = {key: value.cuda() for key, value in inputs.items()}
    assert bool(torch.isfinite(run(model, ids)).all())


def test_text_is_written_on_the_gpu(rng: torch.Generator) -> None:
    model, _ = llama(rng)
    calibration = Calibration("self", sequences=6, length=48)
    report = quantize_model(
        model.eval(),
        CONFIG,
        calibration=calibration,
        device="cuda",
        compute_dtype=torch.bfloat16,
        progress=False,
    )
    assert all(row.output_error is not None for row in report.layers)
    assert len(report.fallbacks) <= len(report.layers) / 4
