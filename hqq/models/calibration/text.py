"""What the model is run on: its own text, random tokens, the caller's texts, or batches as they are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hqq.errors import ConfigError, WeightError
from hqq.models.calibration.settings import RANDOM, SELF, Calibration
from hqq.models.progress import progress_bar
from hqq.models.text import model_device, token_ids

_SEQUENCES = 40
# Second moments of K inputs want clearly more than K tokens.
_TOKENS_PER_INPUT = 1.5


class Batch(NamedTuple):
    """The arguments of one forward pass; `kept` [batch, length] is False for padding, None where there is none."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kept: Tensor | None = None


def tokens_for(model: nn.Module, settings: Calibration, widest: int, progress: bool) -> Tensor | None:
    """Return the token ids [sequences, length] that `settings` ask for, or None if they give the model's inputs.

    widest: largest number of inputs of a layer to calibrate. Raises ConfigError for a model that has no tokens, or for
    texts that are too short.
    """
    texts = settings.texts()
    if texts is not None:
        return _tokenized(model, settings, texts)
    if not isinstance(settings.data, str):
        data = settings.data
        is_tokens = isinstance(data, Tensor) and not data.dtype.is_floating_point
        return (data if data.ndim > 1 else data.unsqueeze(0)) if is_tokens else None
    vocabulary, length = _vocabulary(model, settings.data), context(model, settings.length)
    wanted = settings.sequences or max(_SEQUENCES, -(-int(_TOKENS_PER_INPUT * widest) // length))
    if settings.data == RANDOM:
        generator = torch.Generator().manual_seed(settings.seed)
        return torch.randint(vocabulary, (wanted, length), generator=generator)
    return _write_in_turns(model, wanted, length, vocabulary, settings.seed, progress)


def context(model: nn.Module, length: int) -> int:
    """Return `length`, or the model's longest context if that is less."""
    config = getattr(model, "config", None)
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    return min([length, *(limit for limit in limits if isinstance(limit, int) and limit > 1)])


def _vocabulary(model: nn.Module, data: str) -> int:
    getter = getattr(model, "get_input_embeddings", None)
    embedding = getter() if callable(getter) else None
    count = getattr(embedding, "num_embeddings", None)
    writes = data == RANDOM or _can_write(model)
    if not isinstance(count, int) or not writes:
        raise ConfigError(
            f"got calibration={data!r} for a {type(model).__name__}, which "
            f"{'writes no text' if data == SELF else 'takes no token ids'}; pass inputs as the model takes them: a "
            "tensor, or a list of tensors, dicts or tuples"
        )
    limit = getattr(getattr(model, "config", None), "vocab_size", None)
    return min(count, limit) if isinstance(limit, int) else count


def _can_write(model: nn.Module) -> bool:
    can = getattr(model, "can_generate", None)
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(can()) if callable(can) and not encodes else False


def _write_in_turns(
    model: nn.Module, sequences: int, length: int, vocabulary: int, seed: int, progress: bool
) -> Tensor:
    """Return text as `write_text` does, in as many turns as the device's memory takes."""
    try:
        return write_text(model, sequences, length, vocabulary, seed, progress)
    except torch.cuda.OutOfMemoryError:
        if sequences == 1:
            raise
    parts = (sequences // 2, sequences - sequences // 2)
    turns = [
        _write_in_turns(model, count, length, vocabulary, seed + i * sequences, progress)
        for i, count in enumerate(parts)
    ]
    return torch.cat(turns)


@torch.no_grad()
def write_text(
    model: nn.Module, sequences: int, length: int, vocabulary: int, seed: int, progress: bool = False
) -> Tensor:
    """Return text that a causal language model writes, int64 [sequences, length] on the CPU.

    The first token of each sequence is drawn evenly from the vocabulary, the others from the model's own distribution
    at temperature 1; tokens that end a text do not end a sequence. Raises WeightError if the model gives logits that
    are not finite.
    """
    device = model_device(model)
    generator = torch.Generator(device).manual_seed(seed)
    latest = torch.randint(vocabulary, (sequences, 1), generator=generator, device=device)
    written, cache = [latest], None
    caches = "past_key_values" in inspect.signature(model.forward).parameters
    finite = torch.ones((), dtype=torch.bool, device=device)
    with progress_bar(length - 1, "Writing text", progress, unit="token") as bar:
        for _ in range(length - 1):
            # A model without a cache of what it has read reads it again.
            inputs = latest if cache is not None else torch.cat(written, 1)
            options = {"past_key_values": cache, "use_cache": True} if caches else {}
            output = model(input_ids=inputs, **options)
            cache = getattr(output, "past_key_values", None)
            likely = output.logits[:, -1, :vocabulary].float().softmax(-1)
            finite &= torch.isfinite(likely).all()
            # Of exponential waiting times with these rates the least belongs to a token drawn by them: without a wait
            # for the device, which torch.multinomial asks for its opinion of the probabilities.
            waiting = torch.empty_like(likely).exponential_(generator=generator)
            latest = (likely / waiting).argmax(-1, keepdim=True)
            written.append(latest)
            bar.update()
    if not bool(finite):
        raise WeightError(
            "got logits with NaN or infinite values from the full model; it cannot write text. A dtype of larger "
            "range, float32 or bfloat16, may help"
        )
    return torch.cat(written, 1).cpu()


def _tokenized(model: nn.Module, settings: Calibration, texts: list[str]) -> Tensor:
    assert settings.tokenizer is not None
    length = context(model, settings.length)
    ids = [token for text in texts for token in token_ids(settings.tokenizer, text)]
    found = len(ids) // length
    wanted = min(found, settings.sequences or found)
    if wanted < (settings.sequences or 1):
        raise ConfigError(
            f"got texts of {len(ids)} tokens; {settings.sequences or 1} sequence(s) of {length} need "
            f"{(settings.sequences or 1) * length}, and good results some 20000. Pass more text, or a smaller length"
        )
    return torch.tensor(ids[: wanted * length]).view(wanted, length)


def batches_of(model: nn.Module, settings: Calibration, tokens: Tensor | None) -> list[Batch]:
    """Return the forward passes to run: over `tokens`, or if None over the caller's own inputs."""
    parameters = inspect.signature(model.forward).parameters
    options = {"use_cache": False} if "use_cache" in parameters else {}
    if tokens is not None:
        named = "input_ids" in parameters
        parts = torch.split(tokens, settings.batch_size)
        return [Batch((), {"input_ids": p, **options}) if named else Batch((p,), options) for p in parts]
    return [_as_batch(item, options) for item in _items(settings)]


def _items(settings: Calibration) -> Iterator[Any]:
    data = settings.data
    if isinstance(data, Tensor):
        yield from torch.split(data, settings.batch_size)
    elif isinstance(data, Mapping):
        yield data
    else:
        yield from data


def _as_batch(item: Any, options: dict[str, Any]) -> Batch:
    if isinstance(item, Tensor):
        return Batch((item,), options)
    if isinstance(item, tuple):
        return Batch(item, options)
    if isinstance(item, Mapping):
        mask = item.get("attention_mask")
        kept = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        return Batch((), {**options, **item}, kept)
    raise ConfigError(
        f"got a calibration batch of type {type(item).__name__}; expected a tensor, a dict of keyword arguments or a "
        "tuple of arguments"
    )


def check_enough(tokens: Tensor, need: int, widest: int) -> None:
    """Raise ConfigError if there are fewer than `need` tokens, which layers of `widest` inputs take at least."""
    if tokens.numel() < need:
        raise ConfigError(
            f"got {tokens.numel()} tokens to calibrate with; a layer of {widest} inputs needs at least {need}, and "
            f"good results take some {max(20000, int(_TOKENS_PER_INPUT * widest))}"
        )


def moved(value: Any, device: torch.device) -> Any:
    """Return `value` with every tensor in its tuples, lists and dicts on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(moved(item, device) for item in value)
    if type(value) is dict:
        return {key: moved(item, device) for key, item in value.items()}
    return value
