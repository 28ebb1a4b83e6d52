"""Text from a causal language model, through transformers' own generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hqq.errors import ConfigError, HQQError

Tokenizer = Callable[..., Any]


def model_device(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter, where its inputs go."""
    parameter = next(model.parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of `text`, with the special tokens that the tokenizer adds.

    A text longer than the model's context gives no warning: the callers cut it up, or check its length.
    """
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


@torch.inference_mode()
def generate_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
) -> str:
    """Return the text with which a causal language model continues `prompt`, without the prompt.

    Args:
        model: has transformers' `generate`; it runs where its parameters are.
        tokenizer: encodes the prompt and decodes the new tokens.
        prompt: what to continue; empty only if the tokenizer or the model has a token that begins a text.
        max_new_tokens: where to stop, if the model does not end the text earlier.
        temperature: 0 takes the likeliest token each time; above 0 samples, from flatter probabilities as it grows.
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the likeliest tokens that make up this probability only.
        repetition_penalty: above 1 makes tokens that were there already less likely.
        seed: of the sampling, for the same text again; the generators of the process are left as they were.

    Raises ConfigError for arguments out of range or a prompt that leaves no room in the model's context, HQQError for a
    model that cannot generate.
    """
    if not callable(getattr(model, "generate", None)):
        raise HQQError(f"got {type(model).__name__}, which cannot generate; expected a causal language model")
    sampling = _sampling(temperature, top_k, top_p)
    ids = token_ids(tokenizer, prompt) or _first_token(model, tokenizer)
    _check_room(model, len(ids), max_new_tokens)
    input_ids = torch.tensor([ids], device=model_device(model))
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "pad_token_id": _pad_token(model, tokenizer),
        **sampling,
    }
    if repetition_penalty is not None:
        options["repetition_penalty"] = repetition_penalty
    devices = [input_ids.device] if input_ids.is_cuda else []
    with torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)  # type: ignore[operator]
    new_tokens = output[0, len(ids) :].tolist()
    decode: Callable[..., str] = tokenizer.decode  # type: ignore[attr-defined]
    return decode(new_tokens, skip_special_tokens=True)


def _sampling(temperature: float, top_k: int | None, top_p: float | None) -> dict[str, Any]:
    if temperature < 0:
        raise ConfigError(f"got temperature={temperature}; expected 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"got top_k={top_k}; expected at least 1, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"got top_p={top_p}; expected above 0 and at most 1")
    if temperature == 0:
        # Named, or transformers warns of settings in the model's own defaults that greedy search ignores.
        return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    return {
        "do_sample": True,
        "temperature": temperature,
        "top_k": top_k or 0,
        "top_p": 1.0 if top_p is None else top_p,
    }


def _check_room(model: nn.Module, prompt_tokens: int, max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"got max_new_tokens={max_new_tokens}; expected at least 1")
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if longest and prompt_tokens + max_new_tokens > longest:
        room = longest - prompt_tokens
        advice = f"use max_new_tokens={room} or less" if room > 0 else "shorten the prompt"
        raise ConfigError(
            f"got a prompt of {prompt_tokens} tokens and max_new_tokens={max_new_tokens}; "
            f"the model's context holds {longest}: {advice}"
        )


def _first_token(model: nn.Module, tokenizer: Tokenizer) -> list[int]:
    for owner in (tokenizer, getattr(model, "generation_config", None), getattr(model, "config", None)):
        token = getattr(owner, "bos_token_id", None)
        if isinstance(token, int):
            return [token]
    raise ConfigError("got an empty prompt, and the model has no token that begins a text; pass a prompt")


def _pad_token(model: nn.Module, tokenizer: Tokenizer) -> int | None:
    """Return a padding token: transformers asks for one, and warns without, even for a single prompt."""
    pad = getattr(tokenizer, "pad_token_id", None)
    if isinstance(pad, int):
        return pad
    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return end[0] if isinstance(end, list) else end
