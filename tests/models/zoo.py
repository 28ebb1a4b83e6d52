"""Small random models of many architectures, with inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]

_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}


def _ids(rng: torch.Generator) -> Tensor:
    return torch.randint(3, 96, (2, 7), generator=rng)


def llama(rng: torch.Generator, **options: Any) -> tuple[nn.Module, Inputs]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_SMALL, num_key_value_heads=2, max_position_embeddings=64, **options)
    return LlamaForCausalLM(config), {"input_ids": _ids(rng)}


def tied_llama(rng: torch.Generator) -> tuple[nn.Module, Inputs]:
    return llama(rng, tie_word_embeddings=True)


def qwen2(rng: torch.Generator) -> tuple[nn.Module, Inputs]:
    """Biases on q, k and v."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**_SMALL, num_key_value_heads=2)), {"input_ids": _ids(rng)}


def opt(rng: torch.Generator) -> tuple[nn.Module, Inputs]:
    """Tied embedding, positions with a forward of their own, biases everywhere."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=96,
        word_embed_proj_dim=32,
    )
    return OPTForCausalLM(config), {"input_ids": _ids(rng)}


def bert(rng: torch.Generator) -> tuple[nn.Module, Inputs]:
    """Encoder-only, with a classification head and saved position ids."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**_SMALL)), {"input_ids": _ids(rng)}


def t5(rng: torch.Generator) -> tuple[nn.Module, Inputs]:
    """Encoder-decoder; three names for one embedding; reads wo.weight.dtype."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=96)
    ids = _ids(rng)
    return T5ForConditionalGeneration(config), {"input_ids": ids, "decoder_input_ids": ids[:, :4]}


def vit(rng: torch.Generator) -> tuple[nn.Module, Inputs]:
    """Vision: a convolution, parameters that belong to no leaf module."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {key: value for key, value in _SMALL.items() if key != "vocab_size"}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8))
    return model, {"pixel_values": torch.randn(2, 3, 16, 16, generator=rng)}


ARCHITECTURES: dict[str, Callable[[torch.Generator], tuple[nn.Module, Inputs]]] = {
    "llama": llama,
    "tied_llama": tied_llama,
    "qwen2": qwen2,
    "opt": opt,
    "bert": bert,
    "t5": t5,
    "vit": vit,
}


def build(name: str, rng: torch.Generator) -> tuple[nn.Module, Inputs]:
    """Return a model in eval mode with random weights, and inputs for it."""
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=rng)))
    model, inputs = ARCHITECTURES[name](rng)
    return model.eval(), inputs


@torch.no_grad()
def run(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the model's logits."""
    logits: Tensor = model(**inputs).logits
    return logits


class ConvNet(nn.Module):
    """Convolutions and normalisation with saved and unsaved buffers, a bare parameter, linear layers at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.shift = nn.Parameter(torch.randn(8))
        self.register_buffer("gain", torch.linspace(0.5, 2, 8), persistent=False)
        self.head = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images).mean((2, 3)) * self.gain + self.shift
        result: Tensor = self.head(features)
        return result
