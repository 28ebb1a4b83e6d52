"""The commands end to end, each result checked against the library's own or a computation here."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from hqq import HQQEmbedding, HQQLinear
from hqq.models.checkpoint import load_quantized
from tests.cli.conftest import Run
from tests.cli.tiny_lm import HIDDEN, INTERMEDIATE, LAYERS, byte_tokenizer, tiny_llama

BLOCK_SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
TAGS = [f"model.layers.{layer}.{tag}" for layer in range(LAYERS) for tag in BLOCK_SHAPES]


def quantised(folder: Path) -> dict[str, nn.Module]:
    model = load_quantized(folder, device="cpu")
    return {name: m for name, m in model.named_modules() if isinstance(m, (HQQLinear, HQQEmbedding))}


def same_tensors(a: Path, b: Path) -> bool:
    one, other = (load_quantized(folder, device="cpu").state_dict() for folder in (a, b))
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def test_quantize_writes_a_complete_folder(hqq: Run, model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    result = hqq("quantize", model_folder, out, "--nbits", 3, "--group-size", 16, "--axis", 0, "--json")
    assert (result.status, result.err) == (0, "")
    layers = {row["name"]: row for row in result.json["layers"]}
    assert sorted(layers) == sorted(TAGS)
    assert {(row["nbits"], row["group_size"], row["axis"]) for row in layers.values()} == {(3, 16, 0)}
    assert all(0 < row["error"] < 0.3 for row in layers.values())
    assert {"config.json", "model.safetensors", "generation_config.json"} <= {p.name for p in out.iterdir()}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (model_folder / name).read_bytes()
    loaded = quantised(out)
    assert loaded.keys() == layers.keys()
    originals = tiny_llama().state_dict()
    for name, layer in loaded.items():
        W = originals[f"{name}.weight"]
        assert layer.compute_dtype == torch.float32
        error = ((layer.dequantize() - W).norm() / W.norm()).item()
        assert layers[name]["error"] == pytest.approx(error, rel=1e-5)
    stored = 8 * result.json["bytes"] / sum(p.numel() for p in tiny_llama().parameters())
    assert result.json["effective_bits"] == pytest.approx(stored)


def test_quantize_takes_settings_per_layer_and_skips(hqq: Run, model_folder: Path, tmp_path: Path) -> None:
    per_layer = (
        '{"self_attn.*": {"nbits": 8}, "mlp.down_proj": {"nbits": 2, "group_size": 16}, "mlp.up_proj": null}'
    )
    options = [
        "--config",
        per_layer,
        "--skip",
        "layers.0.self_attn",
        "--group-size",
        32,
        "--dtype",
        "float16",
    ]
    result = hqq("quantize", model_folder, tmp_path / "out", *options)
    assert result.status == 0, result.err
    assert re.search(r"left as it was: model\.layers\.0\.self_attn\.q_proj.* and 1 more", result.out)
    expected = {f"model.layers.1.{tag}": (8, 32) for tag in BLOCK_SHAPES if tag.startswith("self_attn")}
    expected |= {f"model.layers.{layer}.mlp.down_proj": (2, 16) for layer in range(LAYERS)}
    loaded = quantised(tmp_path / "out")
    assert {n: (m.meta["nbits"], m.meta["group_size"]) for n, m in loaded.items()} == expected
    assert all(layer.compute_dtype == torch.float16 for layer in loaded.values())


def test_quantize_embeddings_and_output_layer(hqq: Run, model_folder: Path, tmp_path: Path) -> None:
    left = hqq("quantize", model_folder, tmp_path / "without", "--group-size", 32).out
    assert "model.embed_tokens (an embedding; --embeddings quantises it)" in left
    options = ["--embeddings", "--lm-head", "--group-size", 32, "--format", "pt"]
    assert hqq("quantize", model_folder, tmp_path / "out", *options).status == 0
    assert (tmp_path / "out" / "qmodel.pt").is_file()
    assert sorted(quantised(tmp_path / "out")) == sorted([*TAGS, "lm_head", "model.embed_tokens"])


def test_overwrite_replaces_a_checkpoint_only_when_told(hqq: Run, model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert hqq("quantize", model_folder, out, "--nbits", 2).status == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    result = hqq("quantize", model_folder, out, "--nbits", 8)
    assert result.status == 1
    assert "use --overwrite" in result.err
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    assert hqq("quantize", model_folder, out, "--nbits", 8, "--overwrite").status == 0
    assert {layer.meta["nbits"] for layer in quantised(out).values()} == {8}


def test_inspect_lists_layers_and_totals(hqq: Run, checkpoint: Path, model_folder: Path) -> None:
    result = hqq("inspect", checkpoint, "--json")
    assert (result.status, result.err) == (0, "")
    layers = {row["name"]: row for row in result.json["layers"]}
    assert {name: tuple(row["shape"]) for name, row in layers.items()} == {
        name: BLOCK_SHAPES[name.split(".", 3)[3]] for name in TAGS
    }
    for row in layers.values():
        weights = math.prod(row["shape"])
        # Codes of 4 bits; a scale and a zero in float32 for each 32 of them.
        assert row["bytes"] == weights // 2 + 2 * 4 * weights // 32
        assert row["error"] is None
    plain = [
        tensor
        for name, tensor in load_file(model_folder / "model.safetensors").items()
        if name[:-7] not in layers
    ]
    total = sum(row["bytes"] for row in layers.values()) + sum(tensor.nbytes for tensor in plain)
    assert result.json["bytes"] == total
    weights = sum(p.numel() for p in tiny_llama().parameters())
    assert result.json["effective_bits"] == pytest.approx(8 * total / weights)


def test_inspect_as_text(hqq: Run, checkpoint: Path) -> None:
    lines = hqq("inspect", checkpoint).out.splitlines()
    assert lines[0].split() == ["layer", "shape", "bits", "group", "axis", "size", "bits/weight"]
    row = next(line.split() for line in lines if line.startswith("model.layers.1.mlp.down_proj"))
    assert row[1:] == ["64x96", "4", "32", "1", "4.61", "kB", "6.000"]
    assert sum(line.startswith("model.layers.") for line in lines) == len(TAGS)


def test_inspect_with_the_original_shows_errors(hqq: Run, checkpoint: Path, model_folder: Path) -> None:
    result = hqq("inspect", checkpoint, "--reference", model_folder, "--json")
    assert result.status == 0, result.err
    originals = tiny_llama().state_dict()
    for name, layer in quantised(checkpoint).items():
        W = originals[f"{name}.weight"]
        row = next(row for row in result.json["layers"] if row["name"] == name)
        assert row["error"] == pytest.approx(((layer.dequantize() - W).norm() / W.norm()).item(), rel=1e-5)
    assert hqq("inspect", checkpoint, "--reference", model_folder).out.splitlines()[0].endswith("error")


@pytest.mark.parametrize("source", ["model", "checkpoint"])
def test_eval_is_the_loss_of_the_model(
    hqq: Run, checkpoint: Path, model_folder: Path, text_file: Path, source: str
) -> None:
    path = model_folder if source == "model" else checkpoint
    result = hqq("eval", path, "--text", text_file, "--max-tokens", 50, "--device", "cpu", "--json")
    assert (result.status, result.err) == (0, "")
    ids = torch.tensor([byte_tokenizer()(text_file.read_text()[:51])["input_ids"]])
    model = (
        AutoModelForCausalLM.from_pretrained(path)
        if source == "model"
        else load_quantized(path, device="cpu")
    )
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert result.json["tokens"] == 50
    assert result.json["nll"] == pytest.approx(loss, rel=1e-5)
    assert result.json["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    text = hqq("eval", path, "--text", text_file, "--max-tokens", 50, "--device", "cpu").out
    assert text.startswith("perplexity ")
    assert float(text.split()[1]) == pytest.approx(math.exp(loss), rel=1e-3)


@pytest.mark.parametrize("source", ["model", "checkpoint"])
def test_generate_continues_the_prompt(hqq: Run, checkpoint: Path, model_folder: Path, source: str) -> None:
    path = model_folder if source == "model" else checkpoint
    options = ["--prompt", "The quick", "--max-new-tokens", 8, "--device", "cpu"]
    result = hqq("generate", path, *options, "--json")
    assert (result.status, result.err) == (0, "")
    tokenizer = byte_tokenizer()
    ids = tokenizer("The quick", return_tensors="pt")["input_ids"]
    model = (
        AutoModelForCausalLM.from_pretrained(path)
        if source == "model"
        else load_quantized(path, device="cpu")
    )
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))
    assert result.json["text"] == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert hqq("generate", path, *options).out == "The quick" + result.json["text"] + "\n"
    sampled = [
        hqq("generate", path, *options, "--temperature", 2, "--seed", seed).out for seed in (1, 1, 2, 3)
    ]
    assert sampled[0] == sampled[1]
    assert len(set(sampled)) > 1


def test_convert_there_and_back_is_the_same_to_the_bit(hqq: Run, checkpoint: Path, tmp_path: Path) -> None:
    result = hqq("convert", checkpoint, tmp_path / "pt", "--format", "pt", "--json")
    assert (result.status, result.err) == (0, "")
    assert result.json["format"] == "pt"
    assert (tmp_path / "pt" / "qmodel.pt").is_file()
    assert (tmp_path / "pt" / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    assert hqq("convert", tmp_path / "pt", tmp_path / "back", "--format", "safetensors").status == 0
    assert same_tensors(checkpoint, tmp_path / "pt")
    assert same_tensors(checkpoint, tmp_path / "back")
    assert (
        hqq("inspect", tmp_path / "pt", "--json").json["layers"]
        == hqq("inspect", checkpoint, "--json").json["layers"]
    )
