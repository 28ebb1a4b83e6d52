"""What a trained model is worth (perplexity, bits per byte, a unigram model beside it) and the model card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_CARD = Path(__file__).with_name("stdlib_card.md")


@torch.no_grad()
def nats_per_token(model: nn.Module, tokens: torch.Tensor, context: int, batch: int = 16) -> float:
    """Mean negative log-likelihood of a token stream, in nats.

    `tokens` is an int vector on the model's device. It is cut into consecutive windows of `context` tokens;
    every token but the first is predicted once, from the 1 to `context` tokens before it in its window.
    """
    inputs, targets = tokens[:-1].long(), tokens[1:].long()
    whole = len(inputs) // context * context
    starts = range(0, whole, batch * context)
    pieces = [(slice(start, min(start + batch * context, whole)), context) for start in starts]
    if whole < len(inputs):
        pieces.append((slice(whole, None), len(inputs) - whole))
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)
    for piece, length in pieces:
        logits = model(input_ids=inputs[piece].view(-1, length), use_cache=False).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), targets[piece], reduction="sum").double()
    return total.item() / len(inputs)


def unigram_nats_per_token(train: torch.Tensor, tokens: torch.Tensor, vocabulary: int) -> float:
    """Mean negative log-likelihood, in nats, of `tokens` but the first under the frequencies of `train`.

    Counts are raised by one, so that a token absent from `train` has a probability.
    """
    counts = torch.bincount(train.long(), minlength=vocabulary).double() + 1
    return -(counts / counts.sum()).log()[tokens[1:].long()].mean().item()


def score(nats: float, tokens: int, size: int) -> dict[str, float]:
    """Token perplexity and bits per byte of `tokens` predictions, `nats` each, over `size` bytes of UTF-8."""
    return {"perplexity": math.exp(nats), "bits_per_byte": nats * tokens / math.log(2) / size}


def model_card(figures: Mapping[str, Any], config: Mapping[str, Any], sample: str) -> str:
    """Model card, in Markdown: `figures` as in `training.json`, `config` as in `config.json`."""
    corpus, training, versions = figures["corpus"], figures["training"], figures["versions"]
    held_out, unigram = figures["held_out"], figures["held_out_unigram"]
    fields: dict[str, Any] = {
        **config,
        **training,
        "torch": versions["torch"],
        "transformers": versions["transformers"],
        "parameters": figures["parameters"],
        "megabytes": figures["weight_bytes"] / 1e6,
        "context": figures["context"],
        "train_perplexity": figures["train_perplexity"],
        "perplexity": held_out["perplexity"],
        "bits_per_byte": held_out["bits_per_byte"],
        "held_out_bytes": held_out["bytes"],
        "held_out_tokens": held_out["tokens"],
        "unigram_perplexity": unigram["perplexity"],
        "unigram_bits_per_byte": unigram["bits_per_byte"],
        "corpus_python": corpus["python"],
        "train_files": corpus["train"]["files"],
        "train_bytes": corpus["train"]["bytes"],
        "train_tokens": corpus["train"]["tokens"],
        "evaluations": len(training["validation_curve"]),
        "sample": sample,
    }
    for name in ("held_out_modules", "validation_modules", "shipped_files"):
        fields[name] = ", ".join(f"`{entry}`" for entry in corpus[name])
    return _CARD.read_text(encoding="utf-8").format_map(fields)
