"""`hqq quantize --calibration`: the library's result, in a checkpoint and in words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hqq import Calibration, QuantConfig, quantize_model
from hqq.models.checkpoint import load_quantized
from tests.cli.conftest import Run
from tests.cli.tiny_lm import byte_tokenizer, tiny_llama

OPTIONS = ("--nbits", 3, "--group-size", 16, "--device", "cpu")


@pytest.mark.parametrize("source", ["self", "random", "text"])
def test_the_checkpoint_is_what_the_library_gives(
    hqq: Run, model_folder: Path, tmp_path: Path, source: str
) -> None:
    text = "".join(chr(33 + i * i % 90) for i in range(400))
    (tmp_path / "text").write_text(text, encoding="utf-8")
    argument = tmp_path / "text" if source == "text" else source
    few = () if source == "text" else ("--sequences", 5)
    result = hqq(
        "quantize",
        model_folder,
        tmp_path / "out",
        *OPTIONS,
        "--calibration",
        argument,
        *few,
        "--length",
        40,
        "--json",
    )
    assert (result.status, result.err) == (0, "")
    expected = tiny_llama()
    data, tokenizer = ([text], byte_tokenizer()) if source == "text" else (source, None)
    settings = Calibration(data, tokenizer=tokenizer, sequences=5 if few else None, length=40)
    report = quantize_model(
        expected, QuantConfig(nbits=3, group_size=16), calibration=settings, progress=False
    )
    found = load_quantized(tmp_path / "out", device="cpu").state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.state_dict().items())
    rows = {row["name"]: row for row in result.json["layers"]}
    for row in report.layers:
        assert rows[row.name]["output_error"] == row.output_error
        assert rows[row.name]["output_error_before"] == row.output_error_before


def test_as_text_and_from_a_work_folder(hqq: Run, model_folder: Path, tmp_path: Path) -> None:
    work = ("--calibration", "random", "--sequences", 5, "--length", 40, "--work-folder", tmp_path / "work")
    result = hqq("quantize", model_folder, tmp_path / "out", *OPTIONS, *work)
    assert result.status == 0
    assert "calibrated 14 layers: mean relative error of their outputs 0." in result.out
    assert len(list((tmp_path / "work").glob("part_*.pt"))) == 2
    again = hqq("quantize", model_folder, tmp_path / "again", *OPTIONS, *work)
    assert again.out.splitlines()[1:] == result.out.splitlines()[1:]


@pytest.mark.parametrize("option", ["--sequences", "--length", "--work-folder"])
def test_options_without_calibration(hqq: Run, model_folder: Path, tmp_path: Path, option: str) -> None:
    result = hqq("quantize", model_folder, tmp_path / "out", option, 40)
    assert result.status != 0
    assert "without --calibration" in result.err


def test_a_text_that_is_not_there(hqq: Run, model_folder: Path, tmp_path: Path) -> None:
    result = hqq("quantize", model_folder, tmp_path / "out", "--calibration", tmp_path / "nothing.txt")
    assert result.status != 0
    assert "nothing.txt" in result.err
    assert not (tmp_path / "out").exists()
