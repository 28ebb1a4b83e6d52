"""The small Llama-architecture model of `train_stdlib_model.py` and the loop that trains it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from stdlib_figures import nats_per_token
from stdlib_tokenizer import PADDING_ID, SEPARATOR_ID
from torch import nn
from tqdm import tqdm
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

CONTEXT = 1024
WEIGHT_DECAY = 0.1
WARM_UP = 0.02  # share of the run
EVALUATIONS = 25


def model_config(vocabulary: int) -> dict[str, Any]:
    """Content of `config.json`, in the spelling that transformers 4.56 and 5 both read.

    3.97 M parameters with 3968 tokens; every dimension of every matrix divides by 128.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": vocabulary,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": SEPARATOR_ID,
        "eos_token_id": SEPARATOR_ID,
        "pad_token_id": PADDING_ID,
    }


@dataclass(frozen=True)
class Plan:
    """How to train: limits (the first one reached ends it), batch size in windows, peak rate, seed."""

    epochs: float = 12.0
    minutes: float = 4.0
    steps: int | None = None
    batch_size: int = 32
    learning_rate: float = 3e-3
    seed: int = 0
    compile: bool = False


@dataclass
class Run:
    """What happened during training; progress is the share of the run that is over, from 0 to 1."""

    steps: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0
    kept_at: float = 0.0
    validation_curve: list[dict[str, float]] = field(default_factory=list)


def windows(tokens: torch.Tensor, batch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless batches `[batch, CONTEXT + 1]`, int64.

    Each epoch cuts the stream into windows from a new offset and shuffles them; what does not fill a batch is
    left out, except in a stream too short for one batch. `tokens` must hold at least `2 * CONTEXT` tokens.
    """
    span = torch.arange(CONTEXT + 1, device=tokens.device)
    while True:
        offset = int(torch.randint(CONTEXT, (), generator=generator))
        count = (len(tokens) - 1 - offset) // CONTEXT
        order = torch.randperm(count, generator=generator).to(tokens.device) * CONTEXT + offset
        for first in range(0, max(1, count - batch + 1), batch):
            yield tokens[order[first : first + batch, None] + span].long()


def loss_of(model: nn.Module, window: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats, of a batch of windows `[batch, length + 1]`."""
    logits = model(input_ids=window[:, :-1], use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


def rate_at(progress: float, peak: float) -> float:
    """Learning rate: a linear warm-up, then a cosine down to a hundredth of the peak."""
    if progress < WARM_UP:
        return peak * (0.01 + 0.99 * progress / WARM_UP)
    angle = math.pi * (progress - WARM_UP) / (1 - WARM_UP)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(angle)))


def causal_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **unused: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention over whole windows, `[batch, heads, length, size]` to `[batch, length, heads, size]`.

    Under `torch.compile` the stock implementation builds a mask, which keeps it from the fastest kernels.
    """
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def new_model(config: dict[str, Any], device: torch.device) -> nn.Module:
    """Fresh float32 model; what writes to the residual stream starts smaller, the deeper the model."""
    AttentionInterface.register("whole_window", causal_attention)
    settings = {**config, "dtype": "float32", "attn_implementation": "whole_window"}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**settings))
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.mul_((2 * config["num_hidden_layers"]) ** -0.5)
    return model.to(device).train()


def new_optimizer(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def train(model: nn.Module, streams: dict[str, torch.Tensor], plan: Plan) -> Run:
    """Train in place up to the first limit reached, and keep the weights of the best validation.

    The learning rate follows whichever limit is nearest to being reached. The first step, which compiles,
    does not count against the minutes.
    """
    run, device = Run(), streams["train"].device
    total = plan.epochs * len(streams["train"])
    if plan.steps is not None:
        total = min(total, plan.steps * plan.batch_size * CONTEXT)
    optimizer = new_optimizer(model, plan.learning_rate)
    loss_function: Callable[..., torch.Tensor] = loss_of
    if plan.compile:
        loss_function = torch.compile(loss_of, dynamic=False)
    batches = windows(streams["train"], plan.batch_size, torch.Generator().manual_seed(plan.seed))
    best: dict[str, torch.Tensor] = {}
    started, progress = time.monotonic(), 0.0
    with tqdm(total=total, unit="tok", unit_scale=True, desc="train", mininterval=1.0) as bar:
        while progress < 1:
            for group in optimizer.param_groups:
                group["lr"] = rate_at(progress, plan.learning_rate)
            window = next(batches)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = loss_function(model, window)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if run.steps == 0:
                loss.item()
                started = time.monotonic()
            run.steps += 1
            run.tokens_seen += window[:, 1:].numel()
            run.seconds = time.monotonic() - started
            progress = min(1.0, max(run.tokens_seen / total, run.seconds / 60 / plan.minutes))
            bar.total = round(run.tokens_seen / progress)
            bar.update(window[:, 1:].numel())
            if progress >= (len(run.validation_curve) + 1) / EVALUATIONS:
                best = _validate(model, streams["validation"], run, progress, best)
                bar.set_postfix(train=loss.item(), validation=run.validation_curve[-1]["nats"])
    run.seconds = time.monotonic() - started
    model.load_state_dict(best)
    return run


def _validate(
    model: nn.Module, tokens: torch.Tensor, run: Run, progress: float, best: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Add a point to the validation curve; return the weights to keep, the present ones if it is lowest."""
    nats = nats_per_token(model, tokens, CONTEXT)
    lowest = min((point["nats"] for point in run.validation_curve), default=math.inf)
    point = {"progress": round(progress, 4), "tokens_seen": run.tokens_seen, "nats": nats}
    run.validation_curve.append(point)
    if nats >= lowest:
        return best
    run.kept_at = progress
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
