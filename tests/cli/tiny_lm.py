"""A small untrained Llama with a tokenizer of its own: everything that a language model's folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HIDDEN, INTERMEDIATE, LAYERS = 64, 96, 2


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, after `<s>` and `</s>`; it adds none of the two."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=64
    )


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Return a random model in float32 with a context of 64 tokens; its logits spread like a trained model's."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 258,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def write_folder(path: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a model and its tokenizer to `path` and return it."""
    tiny_llama(seed, **changes).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path
