"""transformers on a GPU: what test_versions.py shows on the CPU, where codes, kernels and inputs are CUDA's.

Other kernels multiply here, so results are compared within roundings of the dtype instead of bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import HqqConfig

from hqq import load_quantized
from hqq.core.experts import HQQExperts
from hqq.core.linear import HQQLinear
from hqq.core.quantize import BaseQuantizeConfig
from hqq.engine.hf import AutoHQQHFModel
from tests.integrations.transformers.models import (
    BUILDERS,
    MIXTURES,
    assert_same,
    experts,
    full_weight,
    inputs,
    logits,
    make_dense,
    open_model,
    quantized,
    save,
)

DEVICE = "cuda"
GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden" / "model"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, module_seed: int) -> Iterator[Any]:
    """A function from a model's name to the folder it is saved in, with fresh weights."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save(name, tmp_path_factory.mktemp(name), module_seed)
        return made[name]

    return folder


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions of float32 round to 19 bits on a GPU unless told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def config(nbits: float = 4, group_size: int = 32, **settings: Any) -> HqqConfig:
    return HqqConfig(nbits=nbits, group_size=group_size, **settings)


def on_gpu(folder: Path, dtype: torch.dtype | None = torch.bfloat16, **options: Any) -> Any:
    return open_model(folder, dtype, device_map=DEVICE, **options)


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """The same computation in another order: this many roundings follow one another in two blocks."""
    roundings = 32
    found, expected = found.float().cpu(), expected.float().cpu()
    allowed = roundings * torch.finfo(dtype).eps * float(expected.abs().max())
    assert float((found - expected).abs().max()) <= allowed


def layers_of(model: nn.Module) -> dict[str, Any]:
    return {**quantized(model), **experts(model)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BUILDERS)
def test_quantise_run_save_and_load(name: str, dtype: torch.dtype, folders: Any, tmp_path: Path) -> None:
    model = on_gpu(folders(name), dtype, quantization_config=config(8))
    dense = on_gpu(folders(name), dtype)
    layers = layers_of(model)
    assert len(layers) > 0
    for layer_name, layer in layers.items():
        assert layer.W_q.is_cuda and layer.scale.is_cuda and layer.device.type == DEVICE
        W = full_weight(dense, layer_name)
        settings = {**layer.quant_config, "offload_meta": False}
        if isinstance(layer, HQQExperts):
            again: Any = HQQExperts.from_weights(W, settings, W.dtype, DEVICE)
        else:
            again = HQQLinear.from_weights(W, None, settings, W.dtype, DEVICE)
        assert torch.equal(layer.W_q, again.W_q), layer_name
    given = inputs(model)
    expected = logits(model, given)
    assert expected.is_cuda
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same(on_gpu(tmp_path, dtype), given, expected)
    on_cpu = open_model(tmp_path, dtype)
    for layer_name, layer in layers_of(on_cpu).items():
        assert torch.equal(layer.W_q, layers[layer_name].W_q.cpu())
    # Rounding may choose other experts, which would be no rounding any more.
    if name not in MIXTURES:
        assert_near(expected, logits(on_cpu, {key: value.cpu() for key, value in given.items()}), dtype)
        assert_near(expected, logits(make_dense(model), given), dtype)
    else:
        assert bool(torch.isfinite(expected).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "opt", "t5", "whisper", "llava", "mixtral"])
def test_generate(name: str, dtype: torch.dtype, folders: Any) -> None:
    model = on_gpu(folders(name), dtype, quantization_config=config())
    given = {key: value for key, value in inputs(model).items() if not key.startswith("decoder")}
    if "input_ids" in given:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    tokens = model.generate(
        **given, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    first = {**given, "decoder_input_ids": tokens.sequences[:, :1]} if name in ("t5", "whisper") else given
    # As above: rounding may choose other experts.
    if name not in MIXTURES:
        assert_near(tokens.logits[0], logits(model, first)[:, -1], dtype)
    assert all(bool(torch.isfinite(step).all()) for step in tokens.logits)
    assert tokens.sequences.shape[1] - (given["input_ids"].shape[1] if first is given else 0) in (6, 7)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_every_setting(nbits: int, axis: int, folders: Any, tmp_path: Path) -> None:
    model = on_gpu(folders("qwen2"), quantization_config=config(nbits, 64, axis=axis))
    given = inputs(model)
    expected = logits(model, given)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(on_gpu(tmp_path), given), expected)
    assert_near(expected, logits(make_dense(model), given), torch.bfloat16)


def test_dynamic_config(folders: Any, tmp_path: Path) -> None:
    dynamic = {
        "self_attn.q_proj": {"nbits": 4, "group_size": 64},
        "mlp.up_proj": {"nbits": 3, "group_size": 32, "axis": 0},
    }
    model = on_gpu(folders("llama"), quantization_config=HqqConfig(dynamic_config=dynamic))
    assert {name.rpartition(".")[2] for name in quantized(model)} == {"q_proj", "up_proj"}
    given = inputs(model)
    expected = logits(model, given)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(on_gpu(tmp_path), given), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_written_by_4_56_2(dtype: torch.dtype) -> None:
    model = on_gpu(GOLDEN / "hf_safetensors", dtype)
    expected = torch.load(GOLDEN / "expected.pt", weights_only=True)
    assert len(quantized(model)) == 14
    found = logits(model, {"input_ids": expected["ids"].to(DEVICE)})
    assert_near(found, expected["hf_logits"], torch.bfloat16)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt", "t5", "mixtral"])
def test_quantised_by_the_library(name: str, folders: Any, tmp_path: Path) -> None:
    model = on_gpu(folders(name))
    settings = BaseQuantizeConfig(nbits=4, group_size=32)
    AutoHQQHFModel.quantize_model(model, settings, compute_dtype=torch.bfloat16, device=DEVICE)
    given = inputs(model)
    expected = logits(model, given)
    AutoHQQHFModel.save_quantized(model, str(tmp_path / "pt"))
    AutoHQQHFModel.save_to_safetensors(model, str(tmp_path / "safetensors"))
    model.save_pretrained(tmp_path / "transformers")
    for folder in ("safetensors", "transformers"):
        assert torch.equal(logits(on_gpu(tmp_path / folder), given), expected)
        assert torch.equal(logits(load_quantized(tmp_path / folder, device=DEVICE), given), expected)
    old = AutoHQQHFModel.from_quantized(str(tmp_path / "pt"), compute_dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(logits(old, given), expected)


@pytest.mark.parametrize("source", ["cpu", DEVICE])
def test_moved_and_cast(source: str, folders: Any) -> None:
    model = open_model(folders("opt"), torch.float16, device_map=source, quantization_config=config(8))
    model.to("cpu" if source == DEVICE else DEVICE).to(torch.bfloat16)
    given = inputs(model)
    assert {layer.W_q.device.type for layer in quantized(model).values()} == {model.device.type} != {source}
    found = logits(model, given)
    assert found.dtype == torch.bfloat16
    assert_near(found, logits(make_dense(model), given), torch.bfloat16)


def test_blocks_on_the_cpu(folders: Any, tmp_path: Path) -> None:
    """A device_map that leaves a block on the CPU: its codes are brought to the GPU for each call."""
    device_map = {
        "model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": "cpu",
        "model.norm": 0, "lm_head": 0,
    }  # fmt: skip
    on_gpu(folders("qwen2"), quantization_config=config()).save_pretrained(tmp_path)
    model, whole = open_model(tmp_path, device_map=device_map), on_gpu(tmp_path)
    given = inputs(whole)
    assert torch.equal(logits(model, given), logits(whole, given))
    fresh = open_model(folders("qwen2"), device_map=device_map, quantization_config=config(8))
    dense = on_gpu(folders("qwen2"))
    difference = (logits(fresh, given) - logits(dense, given)).float()
    assert difference.norm() < 0.1 * logits(dense, given).float().norm()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_quantised_cache(nbits: int, axis: int, folders: Any) -> None:
    from transformers.cache_utils import QuantizedCache

    model = on_gpu(folders("llama"), quantization_config=config(8))
    ids = inputs(model)["input_ids"]
    settings = {
        "nbits": nbits,
        "axis_key": axis,
        "axis_value": axis,
        "q_group_size": 32,
        "residual_length": 4,
    }
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
    }
    cache = QuantizedCache(backend="hqq", config=model.config, **settings)
    tokens = model.generate(ids, past_key_values=cache, **options)
    again = model.generate(
        ids, cache_implementation="quantized", cache_config={"backend": "hqq", **settings}, **options
    )
    assert torch.equal(tokens, again)
    assert tokens.shape == (2, 21)
    for layer in cache.layers:
        codes, meta = layer._quantized_keys
        assert codes.is_cuda and meta["scale"].is_cuda
        assert meta["nbits"] == nbits and meta["axis"] == axis
        kept = layer._dequantize(layer._quantized_keys)
        assert kept.dtype == torch.bfloat16 and kept.is_cuda and bool(torch.isfinite(kept).all())


@pytest.mark.parametrize("head_size", [80, 33, 127])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_keys_come_back_within_a_step(nbits: int, head_size: int) -> None:
    from transformers.cache_utils import HQQQuantizedLayer

    for axis in (0, 1):
        layer = HQQQuantizedLayer(
            nbits=nbits, axis_key=axis, axis_value=axis, q_group_size=64, residual_length=1
        )
        keys = torch.randn(1, 2, 5, head_size, device=DEVICE)
        layer.update(keys, keys.clone())
        more = torch.randn(1, 2, 1, head_size, device=DEVICE)
        found, _ = layer.update(more, more.clone())
        step = float(keys.max() - keys.min()) / (2**nbits - 1)
        assert float((found[:, :, :5] - keys).abs().max()) <= step * (1 + 1e-5)
        assert torch.equal(found[:, :, 5:], more)
