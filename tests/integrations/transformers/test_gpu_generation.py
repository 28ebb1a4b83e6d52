"""Models that transformers quantised while loading them, generating on a GPU: compiled, and as CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, HqqConfig

from hqq.backends.prepare import restore
from hqq.models.generate import HFGenerator
from hqq.models.generation.compiled_runtime import (
    patch_model_for_compiled_runtime,
    unpatch_model_for_compiled_runtime,
)
from hqq.utils.patching import prepare_for_inference
from tests.choices import check_texts
from tests.cli.tiny_lm import byte_tokenizer, write_folder

PROMPTS = ["hello", "a longer prompt"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Inductor's own: what it imports, its advice for models in float32 and for softmax, and the empty graph that it
    # records to set up the memory of CUDA graphs.
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:\s*Online softmax is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
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


def made(model: Any, tokenizer: Any, prompt: str, count: int) -> Tensor:
    """What the model's own generate gives for a prompt, without the prompt."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device="cuda")
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=1
    )
    return out[0, ids.shape[1] :].cpu()


def check(model: Any, tokenizer: Any, prompts: Sequence[str], texts: Sequence[Tensor], count: int) -> None:
    """Assert that each text has `count` tokens, the likeliest ones by the logits of the model's own forward pass."""
    assert [len(text) for text in texts] == [count] * len(prompts)
    check_texts(
        model, [tokenizer(prompt)["input_ids"] for prompt in prompts], [text.tolist() for text in texts]
    )


@pytest.mark.parametrize("compiled", [None, "partial", "full"])
@pytest.mark.parametrize("prepared", [False, True])
def test_generator(prepared: bool, compiled: str | None, model: Any, tokenizer: Any) -> None:
    if prepared:
        prepare_for_inference(model)
    generator = HFGenerator(model, tokenizer, 20, compile=compiled)
    if compiled != "full":
        generator.enable_cuda_graph()
    # Twice, since torch.compile records at the second step: what it recorded gives the later texts.
    single = [
        generator.generate(prompt, use_chat_template=False)["output_tokens"] for prompt in PROMPTS + PROMPTS
    ]
    both = generator.generate(PROMPTS, use_chat_template=False)["output_tokens"]
    restore(model)
    check(model, tokenizer, PROMPTS + PROMPTS, single, 20)
    check(model, tokenizer, PROMPTS, both, 20)


def test_compiled_runtime_of_transformers(model: Any, tokenizer: Any) -> None:
    before = made(model, tokenizer, PROMPTS[0], 20)
    patch_model_for_compiled_runtime(model, tokenizer, max_new_tokens=20)
    texts = [made(model, tokenizer, prompt, 20) for prompt in PROMPTS + PROMPTS]
    # Longer than the warm-up's prompts: another cache, and a length that is no multiple of anything.
    longer = made(model, tokenizer, "x" * 79, 20)
    unpatch_model_for_compiled_runtime(model)
    check(model, tokenizer, PROMPTS + PROMPTS, texts, 20)
    check(model, tokenizer, ["x" * 79], [longer], 20)
    assert torch.equal(made(model, tokenizer, PROMPTS[0], 20), before)


def test_forward_compiled_by_hand_with_a_static_cache(model: Any, tokenizer: Any) -> None:
    model.generation_config.cache_implementation = "static"
    forward = model.forward
    # Without CUDA graphs: the cache is made by the pass over the prompt, which is compiled here, and what a graph of
    # torch.compile made is gone with the next call.
    model.forward = torch.compile(forward, fullgraph=True)
    texts = [made(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    model.forward = forward
    check(model, tokenizer, PROMPTS, texts, 12)
