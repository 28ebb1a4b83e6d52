"""Perplexity: what a language model's quality costs when its weights are quantised."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hqq.errors import ConfigError, HQQError, WeightError
from hqq.models.progress import progress_bar
from hqq.models.text import Tokenizer, model_device, token_ids

_MAX_WINDOW = 2048
_MAX_BATCH = 8
_LOGITS_AT_ONCE = 2**28  # numbers, 1 GiB in float32


@dataclass(frozen=True)
class Perplexity:
    """Result of `perplexity`.

    perplexity is `exp(nll)`, nll the mean negative log-likelihood of a token in nats, tokens how many were
    predicted, seconds how long the model took, window and stride what was used.
    """

    perplexity: float
    nll: float
    tokens: int
    seconds: float
    window: int
    stride: int


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    tokenizer: Tokenizer,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
) -> Perplexity:
    """Return the perplexity of a causal language model on `text`, every token but the first predicted exactly once.

    The text becomes one stream of tokens, read in overlapping windows: a window predicts what no earlier one has, and
    the tokens before that are context only. Log-softmax is in float32, the sum over tokens in float64.

    Args:
        model: gives logits [batch, length, vocabulary] for `input_ids` [batch, length], as transformers' models do.
        tokenizer: called with `text`, gives `input_ids`, special tokens included where it adds them.
        text: what to predict.
        window: tokens a prediction may look back on; None for the model's longest context, at most 2048.
        stride: tokens by which windows advance; None for half a window. A smaller one means more context and more work.
        batch_size: windows per forward pass; None for up to 8, fewer if the vocabulary is large.
        max_tokens: predict only the first `max_tokens` of the text.
        progress: show a progress bar on stderr.

    Raises ConfigError for a text of fewer than two tokens and a window, stride or batch size out of range, WeightError
    if the model gives logits that are not numbers, HQQError if it gives none.
    """
    device = model_device(model)
    tokens = _tokenize(tokenizer, text, max_tokens).to(device)
    window = _window_size(model, window)
    stride = max(1, window // 2) if stride is None else stride
    _check_stride(stride, window)
    window = min(window, len(tokens) - 1)
    logits_of = _LogitsOfLast(model)
    if batch_size is None:
        batch_size = max(1, min(_MAX_BATCH, _LOGITS_AT_ONCE // (window * logits_of.vocabulary)))
    if batch_size < 1:
        raise ConfigError(f"got batch_size={batch_size}; expected at least 1, or None")

    started = time.perf_counter()
    windows = _batches(len(tokens) - 1, window, stride, batch_size)
    with progress_bar(len(tokens) - 1, "Perplexity", progress, unit="token") as bar, _evaluating(model):
        nll = _total_loss(logits_of, tokens, windows, window, bar) / (len(tokens) - 1)
    seconds = time.perf_counter() - started
    if math.isnan(nll):
        raise WeightError(
            "got logits that are not numbers (NaN); a compute dtype of larger range, float32 or bfloat16, may help"
        )
    return Perplexity(_exp(nll), nll, len(tokens) - 1, seconds, window, stride)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _tokenize(tokenizer: Tokenizer, text: str, max_tokens: int | None) -> Tensor:
    """Return the text as one int64 vector, of at most max_tokens + 1."""
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"got max_tokens={max_tokens}; expected at least 1, or None for the whole text")
    ids = token_ids(tokenizer, text)
    if len(ids) < 2:
        raise ConfigError(
            f"got a text of {len(text)} characters, {len(ids)} token(s); perplexity needs at least two tokens, "
            "better some ten thousand"
        )
    return torch.tensor(ids[: None if max_tokens is None else max_tokens + 1], dtype=torch.int64)


def _window_size(model: nn.Module, window: int | None) -> int:
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if window is None:
        return min(longest or _MAX_WINDOW, _MAX_WINDOW)
    if window < 1 or (longest and window > longest):
        limit = f"1 to {longest}, the model's longest context" if longest else "at least 1"
        raise ConfigError(f"got window={window}; expected {limit}")
    return window


def _check_stride(stride: int, window: int) -> None:
    if not 1 <= stride <= window:
        raise ConfigError(
            f"got stride={stride} with window={window}; expected 1 to {window}, or None for half of it"
        )


def _batches(predictions: int, window: int, stride: int, batch_size: int) -> Iterator[tuple[list[int], int]]:
    """Yield (starts of windows, how many tokens at the end of each are scored).

    All windows are whole: the last one moves back to end with the text, and scores only what is left. The first one
    scores all it has, the last one its rest, so only those between are batched.
    """
    yield [0], window
    starts = list(range(stride, predictions - window + 1, stride))
    for first in range(0, len(starts), batch_size):
        yield starts[first : first + batch_size], stride
    rest = predictions - window - stride * len(starts)
    if rest:
        yield [predictions - window], rest


class _LogitsOfLast:
    """Calls a model for the logits of the last positions only, where it knows how to leave out the others."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        parameters = inspect.signature(model.forward).parameters
        self._can_cut = "logits_to_keep" in parameters
        self._options = {"use_cache": False} if "use_cache" in parameters else {}

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary as far as the configuration tells, else a common large one."""
        return getattr(getattr(self._model, "config", None), "vocab_size", None) or 2**16

    def __call__(self, input_ids: Tensor, last: int) -> Tensor:
        options = {**self._options, "logits_to_keep": last} if self._can_cut else self._options
        output = self._model(input_ids=input_ids, **options)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            raise HQQError(
                f"got {type(self._model).__name__}, whose output has no logits for every token; "
                "perplexity needs a causal language model"
            )
        return logits[:, -last:]


def _total_loss(
    logits_of: _LogitsOfLast,
    tokens: Tensor,
    batches: Iterable[tuple[list[int], int]],
    window: int,
    bar: Any,
) -> float:
    """Return the sum over all scored tokens of their negative log-likelihood in nats."""
    total = 0.0
    for starts, scored in batches:
        inputs = torch.stack([tokens[start : start + window] for start in starts])
        ends = [start + window + 1 for start in starts]
        targets = torch.stack([tokens[end - scored : end] for end in ends])
        # Window by window, so that the float32 copy of the logits stays small.
        rows = zip(logits_of(inputs, scored), targets, strict=True)
        losses = [F.cross_entropy(row.float(), target, reduction="none") for row, target in rows]
        # On the CPU: not every accelerator has float64.
        total += torch.stack(losses).cpu().double().sum().item()
        bar.update(targets.numel())
    return total


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
