"""Checkpoints of both formats: what comes back is what was saved, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from hqq import HQQEmbedding, HQQLinear, QuantConfig, load_quantized, quantize_model, save_quantized
from hqq.models.checkpoint import convert_checkpoint, describe_checkpoint, empty_weights
from tests.models.zoo import ARCHITECTURES, ConvNet, build, run

CONFIG = QuantConfig(nbits=3, group_size=16, axis=0)
FORMATS = ("safetensors", "pt")


def same_state(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and flat(dict(a)) == flat(dict(b))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_round_trip(name: str, kind: str, rng: torch.Generator, tmp_path: Path) -> None:
    model, inputs = build(name, rng)
    quantize_model(model, CONFIG, compute_dtype=torch.bfloat16 if name == "llama" else None)
    save_quantized(model, tmp_path / "new", format=kind)
    loaded = load_quantized(tmp_path / "new")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert same_state(loaded, model)
    for key, buffer in model.named_buffers():  # those that are not saved included
        assert torch.equal(loaded.get_buffer(key), buffer) and loaded.get_buffer(key).dtype == buffer.dtype
    if name == "vit":
        inputs = {"pixel_values": inputs["pixel_values"]}
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    assert loaded.config.quantization_config == model.config.quantization_config
    assert loaded.linear_tags == model.linear_tags
    assert not any(p.is_meta for p in loaded.parameters())


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["tied_llama", "opt", "t5"])
@pytest.mark.parametrize("lm_head", [False, True])
def test_shared_weights_are_written_once_and_shared_again(
    name: str, kind: str, lm_head: bool, rng: torch.Generator, tmp_path: Path
) -> None:
    model, inputs = build(name, rng)
    quantize_model(model, QuantConfig(nbits=8, group_size=32), lm_head=lm_head)
    save_quantized(model, tmp_path / "m", format=kind)
    table = model.get_input_embeddings()
    stored = table.W_q if lm_head else table.weight
    # Everything else is far smaller than the table, whose 96 x 32 elements may be in the file once only.
    key = "W_q" if lm_head else "weight"
    if kind == "safetensors":
        with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
            names = [name for name in list(file.keys()) if name.endswith(f".{key}")]
            holders = [name for name in names if file.get_tensor(name).shape == stored.shape]
            assert sum(torch.equal(file.get_tensor(k), stored) for k in holders) == 1
    loaded = load_quantized(tmp_path / "m")
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert getattr(head, key) is getattr(embedding, key)
    assert isinstance(embedding, HQQEmbedding) is lm_head
    assert torch.equal(run(loaded, inputs), run(model, inputs))


def test_shared_layers_with_their_own_biases(tmp_path: Path) -> None:
    def build_pair() -> nn.Module:
        one, other = nn.Linear(32, 32), nn.Linear(32, 32)
        other.weight = one.weight
        return nn.Sequential(one, other)

    model = build_pair()
    quantize_model(model, CONFIG)
    for kind in FORMATS:
        save_quantized(model, tmp_path / kind, format=kind)
        loaded = load_quantized(tmp_path / kind, model=build_pair())
        assert loaded[0].W_q.data_ptr() == loaded[1].W_q.data_ptr()
        assert same_state(loaded, model)
        assert not torch.equal(loaded[0].bias, loaded[1].bias)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("empty", [False, True])
def test_a_model_of_ones_own(kind: str, empty: bool, rng: torch.Generator, tmp_path: Path) -> None:
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=rng)))
    model = ConvNet()
    model(torch.randn(4, 3, 8, 8))  # running statistics that differ from their start
    model.eval()
    quantize_model(model, QuantConfig(nbits=4, group_size=8))
    save_quantized(model, tmp_path / "c", format=kind)
    if empty:
        with empty_weights():
            skeleton = ConvNet()
        assert all(p.is_meta for p in skeleton.parameters()) and not skeleton.gain.is_meta
    else:
        skeleton = ConvNet()
    loaded = load_quantized(tmp_path / "c", model=skeleton.eval())
    assert loaded is skeleton
    images = torch.randn(2, 3, 8, 8, generator=rng)
    assert torch.equal(loaded(images), model(images))
    assert torch.equal(loaded.shift, model.shift)  # a parameter that belongs to no leaf module
    assert loaded.stem[1].num_batches_tracked.dtype == torch.int64
    assert json.loads((tmp_path / "c" / "config.json").read_text())["architectures"] == ["ConvNet"]


def test_shards_and_their_index(rng: torch.Generator, tmp_path: Path) -> None:
    model, inputs = build("llama", rng)
    quantize_model(model, CONFIG)
    save_quantized(model, tmp_path / "m", max_shard_size="8KB")
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 3 and sorted(set(index["weight_map"].values())) == files
    total = 0
    for file in files:
        with safe_open(tmp_path / "m" / file, "pt") as opened:
            keys = list(opened.keys())
            sizes = {key: opened.get_tensor(key).nbytes for key in keys}
        total += sum(sizes.values())
        owners = {key.rpartition(".")[0] for key in keys}
        # The table and the head are larger than a shard and have one of their own.
        assert sum(sizes.values()) <= 8000 or len(owners) == 1
        assert all(index["weight_map"][key] == file for key in keys)
    assert index["metadata"]["total_size"] == total
    assert torch.equal(run(load_quantized(tmp_path / "m"), inputs), run(model, inputs))


@pytest.mark.parametrize(
    "settings", [{"quant_zero": True}, {"quant_scale": True, "quant_zero": True}, {"view_as_float": True}]
)
def test_every_kind_of_layer_converts_bit_for_bit(
    settings: dict[str, Any], rng: torch.Generator, tmp_path: Path
) -> None:
    model, inputs = build("qwen2", rng)
    quantize_model(model, QuantConfig(nbits=4, group_size=16, **settings), compute_dtype=torch.float16)
    save_quantized(model, tmp_path / "a", format="pt")
    convert_checkpoint(tmp_path / "a", tmp_path / "b", format="safetensors")
    convert_checkpoint(tmp_path / "b", tmp_path / "c", format="pt")
    one, other = (torch.load(tmp_path / x / "qmodel.pt", weights_only=True) for x in "ac")
    assert flat(one) == flat(other)
    assert json.loads((tmp_path / "c" / "config.json").read_text()) == json.loads(
        (tmp_path / "a" / "config.json").read_text()
    )
    for x in "abc":
        loaded = load_quantized(tmp_path / x)
        assert same_state(loaded, model)
        assert torch.equal(run(loaded, inputs), run(model, inputs))


def flat(value: Any) -> Any:
    """Return nested dicts with tensors as (dtype, shape, bytes)."""
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().flatten().view(torch.uint8).tolist()
    return value


@pytest.mark.parametrize("kind", FORMATS)
def test_describe_agrees_with_the_report(kind: str, rng: torch.Generator, tmp_path: Path) -> None:
    model, _ = build("tied_llama", rng)
    report = quantize_model(model, {"mlp.*": QuantConfig(nbits=2, group_size=16), "lm_head": CONFIG})
    save_quantized(model, tmp_path / "m", format=kind)
    description = describe_checkpoint(tmp_path / "m")

    def key(row: Any) -> tuple[Any, ...]:
        return row.name, row.shape, row.nbits, row.group_size, row.axis, row.bytes, row.shared_with

    assert sorted(map(key, description)) == sorted(map(key, report.layers))
    assert description.format == kind
    assert (description.weights, description.bytes) == (report.weights, report.bytes)
    assert description.effective_bits == report.effective_bits
    assert json.loads(json.dumps(description.to_dict()))["layers"][0]["name"] == description.layers[0].name


def test_compute_dtype_and_devices_can_be_chosen_at_load(rng: torch.Generator, tmp_path: Path) -> None:
    model, inputs = build("llama", rng)
    quantize_model(model, CONFIG)
    save_quantized(model, tmp_path / "m")
    loaded = load_quantized(tmp_path / "m", compute_dtype=torch.bfloat16, device=["cpu", "cpu:0"])
    model.to(torch.bfloat16)
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    assert run(loaded, inputs).dtype == torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    layer = loaded.model.layers[1].mlp.up_proj
    assert isinstance(layer, HQQLinear) and torch.equal(
        layer.dequantize(), model.model.layers[1].mlp.up_proj.dequantize()
    )


def test_generation_settings_and_other_files_stay(rng: torch.Generator, tmp_path: Path) -> None:
    model, _ = build("llama", rng)
    model.generation_config.max_new_tokens = 17
    quantize_model(model, CONFIG)
    target = tmp_path / "m"
    (target / "notes").mkdir(parents=True)
    (target / "tokenizer.json").write_text("{}")
    (target / "notes" / "card.md").write_text("hello")
    save_quantized(model, target, format="pt")
    save_quantized(model, target, format="safetensors", max_shard_size="8KB")
    save_quantized(model, target)
    assert sorted(path.name for path in target.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes",
        "tokenizer.json",
    ]
    assert (target / "notes" / "card.md").read_text() == "hello"
    assert load_quantized(target).generation_config.max_new_tokens == 17
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_the_tokenizer_of_a_local_model_comes_along(rng: torch.Generator, tmp_path: Path) -> None:
    model, _ = build("llama", rng)
    origin = tmp_path / "origin"
    origin.mkdir()
    (origin / "tokenizer.json").write_text('{"a": 1}')
    model.config._name_or_path = str(origin)
    quantize_model(model, CONFIG)
    save_quantized(model, tmp_path / "m")
    assert (tmp_path / "m" / "tokenizer.json").read_text() == '{"a": 1}'


def test_layers_of_0_1_in_a_whole_model(rng: torch.Generator, tmp_path: Path) -> None:
    """The fixture's layers were written by 0.1.7, with quantised zeros and scales, nested under "meta"."""
    golden = Path(__file__).parents[1] / "fixtures" / "golden"
    old = torch.load(golden / "old_0.1.7.post3.pt", weights_only=True)
    layers = {
        name: entry
        for name, entry in old.items()
        if isinstance(entry, dict) and "W_q" in entry.get("state", entry)
    }
    states = {name.replace(".", "_"): entry.get("state", entry) for name, entry in layers.items()}
    assert states
    (tmp_path / "m").mkdir()
    torch.save(states, tmp_path / "m" / "qmodel.pt")
    shapes = {
        name: state["meta"]["shape"] if "meta" in state else state["shape"] for name, state in states.items()
    }

    def skeleton() -> nn.ModuleDict:
        return nn.ModuleDict(
            {
                name: nn.Linear(shape[1], shape[0], bias=states[name].get("bias") is not None)
                for name, shape in shapes.items()
            }
        )

    loaded = load_quantized(tmp_path / "m", model=skeleton())
    convert_checkpoint(tmp_path / "m", tmp_path / "n", format="safetensors")
    again = load_quantized(tmp_path / "n", model=skeleton())
    for name in states:
        assert torch.equal(loaded[name].dequantize(), again[name].dequantize())
        assert loaded[name].dequantize().isfinite().all()
