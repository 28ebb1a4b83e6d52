"""Small random language models, quantised by HQQ or not."""

from __future__ import annotations

import os

# PEFT asks the hub for the base model's configuration when it saves an adapter; no test needs the answer.
os.environ["HF_HUB_OFFLINE"] = "1"

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hqq.core.quantize import BaseQuantizeConfig
from hqq.models.quantize import quantize_model

VOCABULARY = 64


def float_model(seed: int, dtype: torch.dtype = torch.float32, head_bias: bool = False) -> nn.Module:
    """A Llama of two layers with biased projections; the same for the same seed."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    config = LlamaConfig(**sizes, attention_bias=True, initializer_range=0.2, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    return model.to(dtype).eval()


def hqq_model(seed: int, dtype: torch.dtype = torch.float32, nbits: int = 4, **options: Any) -> nn.Module:
    """The same model quantised."""
    model = float_model(seed, dtype)
    config = BaseQuantizeConfig(nbits=nbits, group_size=16)
    quantize_model(model, config, compute_dtype=dtype, progress=False, **options)
    return model


def tokens(seed: int) -> Tensor:
    """Three rows of 12 tokens."""
    return torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The model's logits in float32."""
    model.eval()
    return model(input_ids=input_ids).logits.float()


def correlation(a: Tensor, b: Tensor) -> float:
    """Correlation coefficient of all entries."""
    return float(torch.corrcoef(torch.stack((a.flatten(), b.flatten()))).min())


def relative_distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of `b`."""
    return float((a - b).norm() / b.norm())
