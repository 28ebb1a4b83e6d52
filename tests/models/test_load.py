"""Opening models by folder: what arrives is what was saved, and what is damaged says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hqq.errors import CheckpointError, CorruptCheckpointError, MissingKeysError
from hqq.models.load import open_full, open_model, open_tokenizer
from tests.cli.tiny_lm import byte_tokenizer, tiny_llama, write_folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("load") / "tiny")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def test_opens_model_and_tokenizer(original: Path) -> None:
    expected = tiny_llama().state_dict()
    model = open_model(original, device="cpu")
    assert not model.training
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert open_model(original, dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16
    assert open_tokenizer(str(original))("a b")["input_ids"] == byte_tokenizer()("a b")["input_ids"]


@pytest.mark.parametrize(
    "source", ["./missing", "/missing/folder", "~/missing-folder", "a/b/c", "no spaces allowed"]
)
def test_a_path_that_does_not_exist(source: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_model(source)


def test_a_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="no local directory and could not be downloaded"):
        open_model("nobody/nothing-of-this-name")


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def drop(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reshape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rename_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="of-no-such-type", architectures=["OfNoSuchType"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (cut, CorruptCheckpointError, "weights are damaged"),
        (drop, MissingKeysError, r"without 1 of the weights .*layers\.1\.mlp\.up_proj"),
        (reshape, CheckpointError, "cannot load"),
        (rename_type, CheckpointError, "of-no-such-type"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            CheckpointError,
            "cannot load: .*model.safetensors",
        ),
        (lambda folder: (folder / "config.json").unlink(), CheckpointError, "without config.json"),
        (lambda folder: (folder / "config.json").write_text('{"a":'), CorruptCheckpointError, "not JSON"),
        (
            lambda folder: (folder / "config.json").write_text("[]"),
            CorruptCheckpointError,
            "expected a JSON object",
        ),
    ],
    ids=["cut", "drop", "reshape", "type", "no-weights", "no-config", "half-config", "list-config"],
)
def test_damage_is_named(
    folder: Path, damage: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    damage(folder)
    with pytest.raises(error, match=message):
        open_model(folder, device="cpu")


def test_a_file_is_not_a_folder(original: Path) -> None:
    with pytest.raises(CheckpointError, match="a file; expected the directory"):
        open_model(original / "config.json")


def test_a_model_without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="the tokenizer of "):
        open_tokenizer(folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        open_tokenizer(folder)


def test_a_quantised_model_is_not_the_original(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantised already"):
        open_full(folder)
