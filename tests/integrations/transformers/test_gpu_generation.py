"""Models that transformers quantised while loading them, generating on a GPU: compiled, and as CUDA graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, HqqConfig

from hqq.models.generate import HFGenerator
from hqq.models.generation.compiled_runtime import (
    patch_model_for_compiled_runtime,
    unpatch_model_for_compiled_runtime,
)
from hqq.utils.patching import prepare_for_inference
from tests.cli.tiny_lm import byte_tokenizer, write_folder

PROMPTS = ["hello", "a longer prompt"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Inductor's own, and its advice for models in float32.
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


@pytest.fixture
def model(tmp_path: Path, seed: int) -> Any:
    """A quantised model that never ends a text."""
    folder = write_folder(tmp_path, seed, max_position_embeddings=128)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cuda", quantization_config=HqqConfig(nbits=4, group_size=32)
    )
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model


def reference(model: Any, tokenizer: Any, prompt: str, count: int) -> torch.Tensor:
    """What the model's own generate gives for a prompt, without the prompt."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device="cuda")
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=1
    )
    return out[0, ids.shape[1] :].cpu()


@pytest.mark.parametrize("compiled", [None, "partial", "full"])
@pytest.mark.parametrize("prepared", [False, True])
def test_generator(prepared: bool, compiled: str | None, model: Any, tokenizer: Any) -> None:
    expected = [reference(model, tokenizer, prompt, 20) for prompt in PROMPTS]
    if prepared:
        prepare_for_inference(model)
    generator = HFGenerator(model, tokenizer, 20, compile=compiled)
    if compiled != "full":
        generator.enable_cuda_graph()
    for prompt, wanted in zip(PROMPTS, expected, strict=True):
        got = generator.generate(prompt, use_chat_template=False)["output_tokens"].cpu()
        # Other kernels round differently, and texts may part where two tokens are about as likely.
        assert torch.equal(got[:3], wanted[:3])
        if compiled is None and not prepared:
            assert torch.equal(got, wanted)
    both = generator.generate(PROMPTS, use_chat_template=False)["output_tokens"]
    for got, wanted in zip(both, expected, strict=True):
        assert torch.equal(got.cpu()[:3], wanted[:3])


def test_compiled_runtime_of_transformers(model: Any, tokenizer: Any) -> None:
    expected = reference(model, tokenizer, PROMPTS[0], 20)
    patch_model_for_compiled_runtime(model, tokenizer, max_new_tokens=20)
    for _ in range(2):
        got = reference(model, tokenizer, PROMPTS[0], 20)
        assert torch.equal(got[:3], expected[:3]) and got.shape == expected.shape
    unpatch_model_for_compiled_runtime(model)
    assert torch.equal(reference(model, tokenizer, PROMPTS[0], 20), expected)


def test_forward_compiled_by_hand_with_a_static_cache(model: Any, tokenizer: Any) -> None:
    expected = reference(model, tokenizer, PROMPTS[0], 12)
    model.generation_config.cache_implementation = "static"
    model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    got = reference(model, tokenizer, PROMPTS[0], 12)
    assert torch.equal(got[:3], expected[:3]) and got.shape == expected.shape
