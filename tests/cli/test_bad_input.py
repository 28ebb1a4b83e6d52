"""Bad input: status 1, one line that says what and what to do, nothing on stdout, nothing written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Result, Run
from tests.cli.tiny_lm import write_folder


def assert_fails(result: Result, *words: str) -> None:
    assert result.status == 1
    assert result.out == ""
    assert result.err.startswith("hqq: ")
    assert result.err.count("\n") == 1
    for word in words:
        assert word in result.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--group-size", "48"], ["group_size=48", "does not divide"]),
        (["--nbits", "7"], ["nbits=7", "expected one of"]),
        (["--axis", "2"], ["axis=2", "0 or 1"]),
        (["--solver", "magic"], ["solver='magic'", "hqq"]),
        (["--config", '{"no_such_layer": {"nbits": 4}}'], ["no_such_layer", "self_attn.q_proj"]),
        (["--config", "{"], ["not valid JSON"]),
        (["--config", "missing.json"], ["No such file", "missing.json"]),
        (["--skip", "*"], ["no layer to quantise"]),
    ],
)
def test_quantize_options(
    hqq: Run, model_folder: Path, tmp_path: Path, options: list[str], words: list[str]
) -> None:
    out = tmp_path / "out"
    assert_fails(hqq("quantize", model_folder, out, *options), *words)
    assert not out.exists()


@pytest.mark.parametrize("command", ["quantize", "inspect", "eval", "generate", "convert"])
def test_sources_that_are_none(hqq: Run, text_file: Path, tmp_path: Path, command: str) -> None:
    rest = {
        "quantize": [tmp_path / "out"],
        "inspect": [],
        "eval": ["--text", text_file],
        "generate": ["--prompt", "a"],
        "convert": [tmp_path / "out", "--format", "pt"],
    }[command]
    (tmp_path / "empty").mkdir()
    assert_fails(hqq(command, tmp_path / "missing", *rest), "does not exist")
    assert_fails(hqq(command, text_file, *rest), "is a file")
    assert_fails(hqq(command, tmp_path / "empty", *rest), "expected")
    assert_fails(hqq(command, "nobody/nothing-of-this-name", *rest), "hub")
    assert not (tmp_path / "out").exists()


def test_a_model_in_full_precision_is_no_checkpoint(hqq: Run, model_folder: Path, tmp_path: Path) -> None:
    assert_fails(hqq("inspect", model_folder), "no quantised layer")
    assert_fails(hqq("convert", model_folder, tmp_path / "out", "--format", "pt"), "no quantised layer")


def test_a_checkpoint_is_not_quantised_twice(hqq: Run, checkpoint: Path, tmp_path: Path) -> None:
    assert_fails(hqq("quantize", checkpoint, tmp_path / "out"), "quantised already")
    assert_fails(hqq("inspect", checkpoint, "--reference", checkpoint), "quantised already")


def test_a_reference_of_another_shape(hqq: Run, checkpoint: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", intermediate_size=32)
    assert_fails(hqq("inspect", checkpoint, "--reference", other), "mlp.down_proj", "(64, 32)", "(64, 96)")


@pytest.mark.parametrize("checkpoint_format", ["safetensors", "pt"])
def test_truncated_checkpoints(
    hqq: Run, checkpoint: Path, text_file: Path, tmp_path: Path, checkpoint_format: str
) -> None:
    folder = tmp_path / "cut"
    if checkpoint_format == "pt":
        assert hqq("convert", checkpoint, folder, "--format", "pt").status == 0
    else:
        shutil.copytree(checkpoint, folder)
    weights = folder / ("qmodel.pt" if checkpoint_format == "pt" else "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert_fails(hqq("inspect", folder), weights.name)
    assert_fails(hqq("eval", folder, "--text", text_file), weights.name)
    assert_fails(hqq("convert", folder, tmp_path / "out", "--format", "pt"), weights.name)
    assert not (tmp_path / "out").exists()


def test_a_truncated_model(hqq: Run, model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "cut"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert_fails(hqq("quantize", folder, tmp_path / "out"), "damaged")
    assert not (tmp_path / "out").exists()


def test_targets_that_cannot_be_written(
    hqq: Run, model_folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for command, *rest in (["quantize", model_folder], ["convert", checkpoint, "--format", "pt"]):
        source, options = rest[0], rest[1:]
        assert_fails(hqq(command, source, file, *options), "a file")
        assert_fails(hqq(command, source, file / "below", *options), "Not a directory", str(file))
        assert_fails(hqq(command, source, checkpoint, *options), "use --overwrite")
        assert_fails(hqq(command, source, model_folder, "--overwrite", *options), "no hqq checkpoint")
        with monkeypatch.context() as patch:  # root may write anywhere: ask as someone who may not
            patch.setattr("os.access", lambda path, mode: False)
            assert_fails(hqq(command, source, tmp_path / "new", *options), "Permission denied", str(tmp_path))
    assert file.read_text() == "kept"


def test_texts_that_are_none(hqq: Run, checkpoint: Path, tmp_path: Path) -> None:
    binary, short = tmp_path / "binary", tmp_path / "short"
    binary.write_bytes(b"\xff\xfe\x00")
    short.write_text("a")
    assert_fails(hqq("eval", checkpoint, "--text", tmp_path / "missing"), "No such file", "missing")
    assert_fails(hqq("eval", checkpoint, "--text", binary), "not UTF-8")
    assert_fails(hqq("eval", checkpoint, "--text", short), "at least two tokens")


def test_settings_out_of_range(hqq: Run, checkpoint: Path, text_file: Path) -> None:
    assert_fails(hqq("eval", checkpoint, "--text", text_file, "--window", "100"), "window=100", "1 to 64")
    assert_fails(hqq("eval", checkpoint, "--text", text_file, "--stride", "0"), "stride=0")
    assert_fails(
        hqq("generate", checkpoint, "--prompt", "a", "--max-new-tokens", "64"), "use max_new_tokens=63"
    )
    assert_fails(hqq("generate", checkpoint, "--prompt", "a", "--device", "nonsense"), "nonsense")


def test_a_checkpoint_without_tokenizer(hqq: Run, checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "bare"))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert_fails(hqq("eval", folder, "--text", text_file), "holds no tokenizer")


def test_tune_needs_a_gpu(hqq: Run, checkpoint: Path) -> None:
    assert_fails(hqq("tune", checkpoint, "--device", "cpu"), "nothing to tune on cpu")
    result = hqq("tune", checkpoint, "--shape", "large")
    assert result.status == 2
    assert "expected outputs x inputs" in result.err
