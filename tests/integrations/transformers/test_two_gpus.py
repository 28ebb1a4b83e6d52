"""A model over two GPUs: what `device_map="auto"` and our own placement put there computes what one GPU computes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import HqqConfig

from hqq import load_quantized, quantize_model, save_quantized
from hqq.core.config import QuantConfig
from hqq.core.quantize import BaseQuantizeConfig
from hqq.engine.hf import AutoHQQHFModel
from hqq.models.generate import HFGenerator
from tests.choices import check_texts
from tests.cli.tiny_lm import byte_tokenizer, write_folder
from tests.integrations.transformers.models import experts, inputs, logits, open_model, quantized, save

ONE, TWO = "cuda:0", "cuda:1"
BOTH = {torch.device(ONE), torch.device(TWO)}
LAYERS = 6
NAMES = ("llama", "llama-tied", "qwen2", "opt", "t5", "llava", "mixtral")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, module_seed: int) -> Iterator[Any]:
    """A function from a model's name to the folder it is saved in, with fresh weights."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save(name, tmp_path_factory.mktemp(name), module_seed, layers=LAYERS)
        return made[name]

    return folder


def config(nbits: float = 4) -> HqqConfig:
    return HqqConfig(nbits=nbits, group_size=32)


def size_of(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))


def halves(model: nn.Module) -> dict[Any, int]:
    """Memory for `device_map="auto"` that the first GPU alone is too small for."""
    return {0: int(0.6 * size_of(model)), 1: 2**30, "cpu": 0}


def codes(model: nn.Module) -> dict[str, Any]:
    return {**quantized(model), **experts(model)}


def assert_split(model: nn.Module) -> None:
    assert {layer.W_q.device for layer in codes(model).values()} == BOTH
    for layer in codes(model).values():
        assert layer.scale.device == layer.zero.device == layer.W_q.device
        assert layer.bias is None or layer.bias.device == layer.W_q.device


def generate(model: Any, given: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    given = {key: value for key, value in given.items() if not key.startswith("decoder")}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    options = {
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        **options,
    }
    tokens: torch.Tensor = model.generate(**given, **options)
    return tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_auto_device_map(name: str, dtype: torch.dtype, folders: Any, tmp_path: Path) -> None:
    alone = open_model(folders(name), dtype, device_map=ONE, quantization_config=config())
    given = inputs(alone)
    expected, tokens = logits(alone, given), generate(alone, given)
    split = open_model(
        folders(name), dtype, device_map="auto", max_memory=halves(alone), quantization_config=config()
    )
    assert_split(split)
    assert codes(split).keys() == codes(alone).keys()
    for layer_name, layer in codes(split).items():
        assert torch.equal(layer.W_q.to(ONE), codes(alone)[layer_name].W_q), layer_name
    assert torch.equal(logits(split, given).to(ONE), expected)
    assert torch.equal(generate(split, given).to(ONE), tokens)
    split.save_pretrained(tmp_path, max_shard_size="100KB")
    for options in ({"device_map": ONE}, {"device_map": "auto", "max_memory": halves(alone)}):
        loaded = open_model(tmp_path, dtype, **options)
        if options["device_map"] == "auto":
            assert_split(loaded)
        assert torch.equal(logits(loaded, given).to(ONE), expected)
        assert torch.equal(generate(loaded, given).to(ONE), tokens)


def test_auto_without_limits_uses_both(folders: Any) -> None:
    split = open_model(folders("llama"), device_map="auto", quantization_config=config())
    alone = open_model(folders("llama"), device_map=ONE, quantization_config=config())
    given = inputs(alone)
    assert_split(split)
    assert torch.equal(logits(split, given).to(ONE), logits(alone, given))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_own_placement(name: str, kind: str, folders: Any, tmp_path: Path) -> None:
    alone = open_model(folders(name), device_map=ONE)
    quantize_model(alone, QuantConfig(nbits=4, group_size=32), progress=False)
    given = inputs(alone)
    expected, tokens = logits(alone, given), generate(alone, given)
    split = open_model(folders(name))
    quantize_model(split, QuantConfig(nbits=4, group_size=32), device=[ONE, TWO], progress=False)
    assert_split(split)
    assert torch.equal(logits(split, given).to(ONE), expected)
    assert torch.equal(generate(split, given).to(ONE), tokens)
    save_quantized(split, tmp_path, format=kind)
    loaded = load_quantized(tmp_path, device=[ONE, TWO])
    assert_split(loaded)
    assert torch.equal(logits(loaded, given).to(ONE), expected)
    assert torch.equal(generate(loaded, given).to(ONE), tokens)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral"])
def test_old_engine_with_a_device_map(name: str, folders: Any, tmp_path: Path) -> None:
    device_map = {
        "model.embed_tokens": ONE, "model.rotary_emb": ONE, "model.norm": TWO, "lm_head": TWO,
        **{f"model.layers.{i}": ONE if i < LAYERS // 2 else TWO for i in range(LAYERS)},
    }  # fmt: skip
    settings = BaseQuantizeConfig(nbits=4, group_size=32)
    alone, split = open_model(folders(name), device_map=ONE), open_model(folders(name))
    AutoHQQHFModel.quantize_model(alone, settings, compute_dtype=torch.bfloat16, device=ONE)
    AutoHQQHFModel.quantize_model(split, settings, compute_dtype=torch.bfloat16, device=device_map)
    given = inputs(alone)
    expected = logits(alone, given)
    assert_split(split)
    assert torch.equal(logits(split, given).to(ONE), expected)
    AutoHQQHFModel.save_quantized(split, str(tmp_path))
    for device in (device_map, [ONE, TWO]):
        loaded = AutoHQQHFModel.from_quantized(str(tmp_path), compute_dtype=torch.bfloat16, device=device)
        assert_split(loaded)
        assert torch.equal(logits(loaded, given).to(ONE), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_quantised_cache(axis: int, folders: Any) -> None:
    alone = open_model(folders("llama"), device_map=ONE, quantization_config=config(8))
    split = open_model(
        folders("llama"), device_map="auto", max_memory=halves(alone), quantization_config=config(8)
    )
    assert_split(split)
    settings = {"backend": "hqq", "nbits": 4, "axis_key": axis, "axis_value": axis, "q_group_size": 32,
                "residual_length": 4}  # fmt: skip
    given = inputs(alone)

    def tokens(model: Any) -> torch.Tensor:
        # generate takes the backend out of the dict that it is given.
        return generate(model, given, cache_implementation="quantized", cache_config=dict(settings))

    assert torch.equal(tokens(split).to(ONE), tokens(alone))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # its advice
@pytest.mark.parametrize("compiled", [None, "partial"])
def test_graphs_on_the_second_gpu(compiled: str | None, tmp_path: Path, seed: int) -> None:
    """The current device is the first one, on whose streams nothing happens."""
    folder = write_folder(tmp_path, seed, max_position_embeddings=128)
    model = open_model(folder, torch.float32, device_map=TWO, quantization_config=config())
    tokenizer = byte_tokenizer()
    generator = HFGenerator(model, tokenizer, 20, compile=compiled, eos_token_id=())
    generator.enable_cuda_graph()
    prompts = ["hello", "a longer prompt"]
    texts = [generator.generate(prompt, use_chat_template=False)["output_tokens"] for prompt in prompts]
    assert torch.cuda.current_device() == 0
    assert [len(text) for text in texts] == [20, 20]
    check_texts(
        model, [tokenizer(prompt)["input_ids"] for prompt in prompts], [text.tolist() for text in texts]
    )


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_lora(folders: Any) -> None:
    peft = pytest.importorskip("peft")
    alone = open_model(folders("llama"), torch.float32, device_map=ONE, quantization_config=config(8))
    split = open_model(
        folders("llama"), torch.float32, device_map="auto", max_memory=halves(alone), quantization_config=config(8)
    )  # fmt: skip
    assert_split(split)
    given = inputs(alone)
    model = peft.get_peft_model(split, peft.LoraConfig(target_modules="all-linear", lora_alpha=32))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.device for parameter in trained} == BOTH
    optimizer = torch.optim.SGD(trained, lr=1.0)
    losses = []
    for _ in range(12):
        loss = model(**given, labels=given["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    expected = logits(model, given)
    merged = model.merge_and_unload()
    assert_split(merged)
    difference = (logits(merged, given) - expected).float()
    assert difference.norm() < 0.1 * expected.float().norm()
