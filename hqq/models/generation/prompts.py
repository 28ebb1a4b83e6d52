"""From prompts to one batch of tokens, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hqq.errors import ConfigError

Prompt = str | Sequence[str]


def as_list(prompt: Prompt) -> list[str]:
    """Return the prompts; raises ConfigError if there are none, or if they are not text."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise ConfigError(f"got prompt={prompt!r}; expected a str, or a list of at least one")
    return prompts


def encode(tokenizer: Any, prompt: Prompt, use_chat_template: bool) -> list[list[int]]:
    """Return the tokens of each prompt; raises ConfigError for an empty prompt or a missing chat template."""
    if use_chat_template and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "got a tokenizer without a chat template; pass use_chat_template=False to continue the prompt as it is"
        )
    batch = []
    for given in as_list(prompt):
        text = in_template(tokenizer, given) if use_chat_template else given
        # A template writes the special tokens itself.
        ids = tokenizer(text, add_special_tokens=not use_chat_template, verbose=False)["input_ids"]
        if not ids:
            raise ConfigError("got an empty prompt, for which the tokenizer gives no token; pass some text")
        batch.append(list(ids))
    return batch


def in_template(tokenizer: Any, prompt: str) -> str:
    """Return `prompt` as the one message of a conversation, up to where the answer begins."""
    messages = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def pad_token(tokenizer: Any, ends: Sequence[int]) -> int:
    """Return a token to fill up with. No model sees it: the attention mask covers it."""
    pad = getattr(tokenizer, "pad_token_id", None)
    return pad if isinstance(pad, int) else next(iter(ends), 0)


def left_padded(batch: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask` [B, longest] (int64): the last token of every row is in one column."""
    longest = max(map(len, batch))
    ids = [[pad] * (longest - len(row)) + list(row) for row in batch]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in batch]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }
