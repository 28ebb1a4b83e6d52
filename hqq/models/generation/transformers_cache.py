"""transformers' static cache, and how its versions want a model called with it: the one place that knows."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hqq.errors import BackendError


class CachedModel:
    """A model with a static cache of `length` positions, called the way this version of transformers wants.

    The cache is allocated by the first call, for the batch of that call.
    """

    def __init__(self, model: nn.Module, length: int) -> None:
        from transformers import StaticCache

        self.model = model
        config: Any = model.config
        self.cache: Any = StaticCache(config=config, max_cache_len=length)
        self.cache.layers = [_without_window(layer, length) for layer in self.cache.layers]
        names = set(inspect.signature(model.forward).parameters)
        self._takes_positions = "position_ids" in names
        # Until transformers 5.x let the cache count its tokens, models passed the positions down to it.
        self._takes_cache_position = "cache_position" in names
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in names else {}

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache_position: Tensor
    ) -> Tensor:
        """Return the logits [B, V] of the last position; the cache then holds `input_ids` [B, M] as well.

        attention_mask [B, up to length]: 1 for every token so far, 0 for padding and for what is still to come;
        position_ids [B, M]; cache_position [M], where the tokens go.
        """
        options: dict[str, Any] = dict(self._last_only)
        if self._takes_positions:
            options["position_ids"] = position_ids
        if self._takes_cache_position:
            options["cache_position"] = cache_position
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **options,
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def reset(self) -> None:
        """Empty the cache; its tensors stay where they are."""
        self.cache.reset()

    def tensors(self) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values [B, KV, length, D] of each layer, once the cache is allocated."""
        return [(layer.keys, layer.values) for layer in self.cache.layers]

    def lengths(self) -> list[Tensor]:
        """Return the counters that the cache keeps as tensors, which a step advances in place."""
        counters = (getattr(layer, "cumulative_length", None) for layer in self.cache.layers)
        return [counter for counter in counters if isinstance(counter, Tensor)]

    def check_capturable(self, compiled: bool) -> None:
        """Raise BackendError if a step cannot be recorded as a CUDA graph and repeated."""
        from transformers.cache_utils import StaticLayer
        from transformers.utils import import_utils

        devices = {p.device for p in self.model.parameters()}
        if len(devices) != 1 or next(iter(devices)).type != "cuda":
            names = ", ".join(sorted(map(str, devices)))
            raise BackendError(f"got a model on {names}; CUDA graphs need all of it on one CUDA device")
        others = sorted(
            {type(layer).__name__ for layer in self.cache.layers if type(layer) is not StaticLayer}
        )
        if others:
            raise BackendError(
                f"got a model with {', '.join(others)} in its cache; a CUDA graph cannot repeat what those count in "
                'Python. Use compile="partial" without enable_cuda_graph()'
            )
        if not compiled and not hasattr(import_utils, "is_cuda_stream_capturing"):
            raise BackendError(
                "got a transformers older than 5, which reads the attention mask on the host in each step; for CUDA "
                'graphs use compile="partial", or a newer transformers'
            )


def _without_window(layer: Any, length: int) -> Any:
    """Return a layer of the cache that keeps all tokens in place of one that keeps a window of them.

    The attention mask cuts the window out of it. A window that slides counts its tokens in Python, which makes another
    graph of every step.
    """
    from transformers.cache_utils import StaticLayer

    slides = type(layer).__name__ in ("SlidingWindowLayer", "ChunkedSlidingLayer", "StaticSlidingWindowLayer")
    return StaticLayer(max_cache_len=length) if slides else layer


def keep_in_place(cache: Any) -> None:
    """Tell torch.compile that the tensors of a cache stay where they are, as transformers does where it allocates them.

    It does not where a compiled graph allocates them, and CUDA graphs do not change tensors that may move.
    """
    for layer in getattr(cache, "layers", ()):
        for tensor in (getattr(layer, name, None) for name in ("keys", "values", "cumulative_length")):
            if isinstance(tensor, Tensor):
                torch._dynamo.mark_static_address(tensor)


def context_length(model: nn.Module) -> int | None:
    """Return how many positions the model was made for, or None if its configuration does not say."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Return the tokens that end a text: those that transformers' own generate stops at, else the tokenizer's."""
    for owner in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        if isinstance(ids, Tensor):
            ids = ids.tolist()
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def vocabulary_size(model: Any) -> int:
    """Return the number of logits of the model."""
    head = model.get_output_embeddings()
    size = getattr(head, "out_features", None)
    return int(size if size is not None else model.config.get_text_config().vocab_size)


def empty_mask(batch: int, length: int, device: torch.device) -> Tensor:
    """Return the mask of an empty cache, [batch, length] (int64)."""
    return torch.zeros(batch, length, dtype=torch.long, device=device)
