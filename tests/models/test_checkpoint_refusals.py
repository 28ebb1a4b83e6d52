"""Damaged, incomplete and foreign checkpoints: specific errors, and a model that was passed in stays as it was."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hqq import QuantConfig, load_quantized, quantize_model, save_quantized
from hqq.errors import (
    CheckpointError,
    CheckpointExistsError,
    CorruptCheckpointError,
    HQQError,
    MissingKeysError,
    NotQuantizedError,
    ShapeError,
)
from hqq.models.checkpoint import convert_checkpoint, describe_checkpoint


def make_model(width: int = 32) -> nn.Module:
    model = nn.Sequential(
        nn.Embedding(16, 32), nn.Linear(32, width), nn.LayerNorm(width), nn.Linear(width, 8)
    )
    model.extra = nn.Parameter(torch.randn(3))
    return model


@pytest.fixture(params=["safetensors", "pt"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = make_model()
    quantize_model(model, QuantConfig(nbits=4, group_size=16))
    return save_quantized(model, tmp_path / "m", format=request.param)


def refuse(path: Path, error: type[HQQError], message: str, model: nn.Module | None = None) -> None:
    """Assert that loading fails with this error and leaves the model as it is."""
    model = make_model() if model is None else model
    kinds = [type(module) for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        load_quantized(path, model=model)
    assert [type(module) for module in model.modules()] == kinds
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def weights(path: Path) -> Path:
    return next(p for p in path.iterdir() if p.name in ("model.safetensors", "qmodel.pt"))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a checkpoint by flat name, as a foreign writer would: without checksums."""
    file = weights(path)
    if file.suffix == ".pt":
        modules = torch.load(file, weights_only=True)
        tensors = {f"{m}.{k}" if m else k: v for m, state in modules.items() for k, v in state.items()}
        change(tensors)
        modules = {}
        for name, value in tensors.items():
            module, _, key = name.rpartition(".")
            modules.setdefault(module, {})[key] = value
        torch.save(modules, file)
    else:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("key", ["1.W_q", "1.scale", "1.nbits", "1.bias", "2.weight", "0.weight", "extra"])
def test_missing_keys(saved: Path, key: str) -> None:
    rewrite(saved, lambda tensors: _drop(tensors, key))
    refuse(saved, MissingKeysError, key.rpartition(".")[0] or key)


def _drop(tensors: dict[str, torch.Tensor], key: str) -> None:
    del tensors[key]


@pytest.mark.parametrize("key", ["7.weight", "2.other", "surplus"])
def test_extra_keys(saved: Path, key: str) -> None:
    rewrite(saved, lambda tensors: tensors.update({key: torch.zeros(2)}))
    refuse(saved, MissingKeysError, f"not in the model {key}")


def test_wrong_shapes(saved: Path) -> None:
    refuse(saved, ShapeError, r"(1: .*\(32, 32\).*\(48, 32\))|(2.weight: .*\(32,\).*\(48,\))", make_model(48))
    rewrite(saved, lambda tensors: tensors.update({"1.scale": tensors["1.scale"][:-1].clone()}))
    refuse(saved, ShapeError, r"1: got scale of shape \(63, 1\); expected \(64, 1\)")


def test_another_architecture(saved: Path) -> None:
    refuse(saved, MissingKeysError, "the model has a ReLU", nn.Sequential(nn.Embedding(16, 32), nn.ReLU()))


def test_truncation_at_any_length(saved: Path) -> None:
    file = weights(saved)
    content = file.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1]:
        file.write_bytes(content[:length])
        refuse(saved, CorruptCheckpointError, file.name)


def test_a_flipped_bit_anywhere_is_noticed_or_harmless(saved: Path, seed: int) -> None:
    """Every flip in the data is an error; one in a format's padding or dates may leave all tensors as they were."""
    file = weights(saved)
    content = file.read_bytes()
    good = load_quantized(saved, model=make_model()).state_dict()
    randomness = random.Random(seed)
    noticed = 0
    for _ in range(60):
        position, bit = randomness.randrange(len(content)), randomness.randrange(8)
        damaged = bytearray(content)
        damaged[position] ^= 1 << bit
        file.write_bytes(damaged)
        try:
            got = load_quantized(saved, model=make_model()).state_dict()
        except HQQError:
            noticed += 1
        else:
            assert got.keys() == good.keys() and all(torch.equal(got[key], good[key]) for key in good), (
                position
            )
    assert noticed > 30


def test_files_that_are_no_checkpoints(saved: Path, tmp_path: Path) -> None:
    file = weights(saved)
    file.write_bytes(os.urandom(5000))
    refuse(saved, CorruptCheckpointError, file.name)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")
    refuse(saved, CorruptCheckpointError, file.name)
    file.unlink()
    refuse(saved, CheckpointError, "holds config.json; expected")
    refuse(tmp_path / "nowhere", CheckpointError, "does not exist; expected a directory or a hub id")
    refuse(saved / "config.json", CheckpointError, "which is a file")


def test_code_in_a_pickle_is_not_run(saved: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.system, (f"touch {saved / 'sprung'}",))

    for file in saved.glob("*model*"):
        file.unlink()
    torch.save({"1": Trap()}, saved / "qmodel.pt")
    refuse(saved, CorruptCheckpointError, "plain tensors and values")
    assert not (saved / "sprung").exists()


def test_an_index_that_names_what_is_not_there(tmp_path: Path) -> None:
    model = make_model()
    quantize_model(model, QuantConfig(nbits=4, group_size=16))
    path = save_quantized(model, tmp_path / "m", max_shard_size=1500)
    shards = sorted(path.glob("model-*.safetensors"))
    content = shards[1].read_bytes()
    shards[1].unlink()
    refuse(path, CheckpointError, f"naming {shards[1].name}")
    shards[1].write_bytes(shards[0].read_bytes())
    refuse(path, CorruptCheckpointError, "in files that do not hold them")
    shards[1].write_bytes(content)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    (path / "model.safetensors.index.json").write_text(
        json.dumps({**index, "weight_map": {"a": "../../secret"}})
    )
    refuse(path, CheckpointError, "secret")
    (path / "model.safetensors.index.json").write_text("{not json")
    refuse(path, CorruptCheckpointError, "not JSON")


def test_what_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    with pytest.raises(NotQuantizedError, match="quantize_model"):
        save_quantized(model, tmp_path / "m")
    quantize_model(model, QuantConfig(nbits=4, group_size=16))
    save_quantized(model, tmp_path / "m")
    with pytest.raises(CheckpointExistsError, match="overwrite=True"):
        save_quantized(model, tmp_path / "m", overwrite=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointExistsError, match="which is a file"):
        save_quantized(model, tmp_path / "file")
    with pytest.raises(CheckpointError, match="could not be written"):
        save_quantized(model, tmp_path / "file" / "inside")
    (tmp_path / "original").mkdir()
    save_file({"w": torch.zeros(2)}, tmp_path / "original" / "model.safetensors")
    with pytest.raises(CheckpointExistsError, match="not an hqq checkpoint"):
        save_quantized(model, tmp_path / "original")
    monkeypatch.chdir(tmp_path / "m")
    with pytest.raises(CheckpointError, match="current directory"):
        save_quantized(model, ".")
    with pytest.raises(CheckpointError, match="expected one of safetensors, pt"):
        save_quantized(model, tmp_path / "x", format="gguf")
    with pytest.raises(CheckpointError, match="max_shard_size"):
        save_quantized(model, tmp_path / "x", max_shard_size="many")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "m", "original"]


def test_a_config_that_describes_no_transformers_model(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="pass it: load_quantized"):
        load_quantized(saved)
    content = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(
        json.dumps({**content, "model_type": "llama", "architectures": ["NewModel"]})
    )
    with pytest.raises(CheckpointError, match="NewModel"):
        load_quantized(saved)
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"without config.json"):
        load_quantized(saved)
    assert len(describe_checkpoint(saved)) == 2


def test_buffers_that_nothing_can_fill(tmp_path: Path) -> None:
    class Rotating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)
            self.register_buffer("angles", torch.arange(3.0), persistent=False)

    model = Rotating()
    quantize_model(model, QuantConfig(nbits=4, group_size=16))
    save_quantized(model, tmp_path / "m")
    with torch.device("meta"):
        skeleton = Rotating()
    with pytest.raises(CheckpointError, match="angles are on the meta device.*empty_weights"):
        load_quantized(tmp_path / "m", model=skeleton)


def test_converting_takes_quantised_checkpoints_only(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    save_file(make_model().state_dict(), tmp_path / "full" / "model.safetensors")
    (tmp_path / "full" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no quantised layer"):
        convert_checkpoint(tmp_path / "full", tmp_path / "target", format="pt")
    assert not (tmp_path / "target").exists()
