"""An interrupted calibration goes on where it stopped, and ends with the same bits."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hqq import Calibration, QuantConfig, quantize_model
from hqq.errors import CheckpointError, CorruptCheckpointError
from hqq.models.calibration import resume, run
from hqq.models.report import QuantizationReport
from tests.models.test_calibration import mixtral
from tests.models.zoo import llama

CONFIG = QuantConfig(nbits=3, group_size=16)


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """What stops a run in these tests."""


@pytest.fixture(params=["llama", "mixtral"])
def model(request: pytest.FixtureRequest, rng: torch.Generator) -> nn.Module:
    return llama(rng)[0].eval() if request.param == "llama" else mixtral()


def calibration(folder: Path | None, **options: Any) -> Calibration:
    return Calibration(**{"sequences": 4, "length": 40, "folder": folder, **options})


def quantized(model: nn.Module, folder: Path | None, **options: Any) -> tuple[nn.Module, QuantizationReport]:
    twin = copy.deepcopy(model)
    dtype = torch.bfloat16
    settings = calibration(folder, **options)
    return twin, quantize_model(twin, CONFIG, calibration=settings, compute_dtype=dtype, progress=False)


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        states[0][key].dtype == value.dtype and torch.equal(states[0][key], value)
        for key, value in states[1].items()
    )


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes the run stop when so many parts have been kept (0: after the text)."""
    keep_part = resume.WorkFolder.keep_part
    kept: list[int] = []

    def stopping(limit: int) -> list[int]:
        kept.clear()

        def keep(self: resume.WorkFolder, index: int, content: Mapping[str, Any]) -> None:
            if index >= limit:
                raise Interrupted
            kept.append(index)
            keep_part(self, index, content)

        monkeypatch.setattr(resume.WorkFolder, "keep_part", keep)
        return kept

    return stopping


@pytest.mark.parametrize("parts", [0, 1])
def test_the_result_is_that_of_an_undisturbed_run(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: Any, parts: int
) -> None:
    expected, report = quantized(model, None)
    stop_after(parts)
    with pytest.raises(Interrupted):
        quantized(model, tmp_path / "work")
    kept = stop_after(99)
    written: list[Tensor] = []
    monkeypatch.setattr(run, "tokens_for", lambda *args: written.append(args))
    found, again = quantized(model, tmp_path / "work")
    assert written == []  # the text is read, not written anew
    assert kept == list(range(parts, 2))
    assert same_bits(found, expected)
    for one, other in zip(again.layers, report.layers, strict=True):
        assert (one.name, one.fallback, one.bytes) == (other.name, other.fallback, other.bytes)
        assert (one.output_error, one.output_error_before) == (other.output_error, other.output_error_before)
    # Once more with everything there: nothing is calibrated.
    kept = stop_after(0)
    assert same_bits(quantized(model, tmp_path / "work")[0], expected)
    assert kept == []


def test_a_folder_of_something_else_is_refused(rng: torch.Generator, tmp_path: Path) -> None:
    model = llama(rng)[0].eval()
    quantized(model, tmp_path)
    with pytest.raises(CheckpointError, match="another settings; use a new folder"):
        quantized(model, tmp_path, seed=1)
    with pytest.raises(CheckpointError, match="another data"):
        quantized(model, tmp_path, data="random")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match="another model"):
        quantized(other, tmp_path)
    with pytest.raises(CheckpointError, match="another configuration"):
        quantize_model(model, QuantConfig(nbits=4, group_size=16), calibration=calibration(tmp_path))


def test_a_damaged_file_is_named(rng: torch.Generator, tmp_path: Path) -> None:
    model = llama(rng)[0].eval()
    quantized(model, tmp_path)
    file = tmp_path / "part_0001.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CorruptCheckpointError, match=r"part_0001\.pt.*remove it"):
        quantized(model, tmp_path)
    file.unlink()
    assert same_bits(quantized(model, tmp_path)[0], quantized(model, None)[0])
