"""Making the `generate` of a transformers model run with a static cache and a compiled decoding step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hqq.errors import ConfigError
from hqq.models.generation.accelerate_hooks import make_hooks_compilable
from hqq.models.generation.compiling import collection_paused, own_code, without_graphs
from hqq.models.generation.prompts import in_template, pad_token
from hqq.models.generation.transformers_cache import end_tokens, keep_in_place
from hqq.models.text import model_device

WARMUP_PROMPTS = (
    "Describe what a compiler does.",
    "Name three rivers and the seas they end in.",
    "def mean(values):",
    "Once upon a time there was a very small computer that",
    "Why is the sky blue?",
)

_ATTRIBUTE = "_hqq_compiled_runtime"
# Lengths of caches are multiples of this: calls of about the same length share one graph, and CUDA's attention takes
# the rows of a mask as they are.
_CACHE_STEP = 64
_COMPILE_OPTIONS: Mapping[str, Any] = {"mode": "reduce-overhead", "fullgraph": True}


@dataclass(frozen=True)
class _Before:
    """What the model was like: its own `forward` attribute if it had one, its mode and its settings."""

    forward: Callable[..., Any] | None
    training: bool
    use_cache: Any
    generation: dict[str, Any]


def patch_model_for_compiled_runtime(
    model: nn.Module,
    tokenizer: Any = None,
    warmup: bool = True,
    max_new_tokens: int = 1000,
    patch_accelerate: bool = True,
    pre_compile: bool | None = None,
    compile_prefill: bool = False,
    *,
    compile_options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Make `model.generate` use a static cache and a compiled forward pass for each new token; returns `model`.

    Args:
        model: a causal language model of transformers; put into eval mode. `unpatch_model_for_compiled_runtime` makes
            it what it was.
        tokenizer: for the warm-up, which needs one; its end token becomes its padding token if it has none.
        warmup: generate from a few prompts, so that compilation is done.
        max_new_tokens: of the warm-up. Cache and graph fit calls of as many tokens; longer ones compile again.
        patch_accelerate: let the hooks of a model that accelerate dispatched compile (`make_hooks_compilable`); this
            stays when the rest is undone.
        pre_compile: compile here (then transformers' own compilation is off); None does so unless the model's
            generation_config has a compile_config.
        compile_prefill: compile the pass over the prompt too, for all lengths.
        compile_options: arguments of torch.compile; default mode="reduce-overhead", fullgraph=True.

    Raises ConfigError for a model that has no `generate`, or is patched already.
    """
    if not callable(getattr(model, "generate", None)):
        raise ConfigError(
            f"got {type(model).__name__}, which has no generate; expected a model of transformers"
        )
    if _ATTRIBUTE in vars(model):
        raise ConfigError(
            "got a model that is patched already; call unpatch_model_for_compiled_runtime(model) first"
        )
    generation: Any = model.generation_config
    if pre_compile is None:
        pre_compile = getattr(generation, "compile_config", None) is None
    settings: dict[str, Any] = {"cache_implementation": "static"}
    if pre_compile:
        settings["disable_compile"] = True
    prompts: list[Tensor] = []
    if tokenizer is not None and warmup:
        prompts = _warmup_prompts(tokenizer, model_device(model))
        settings |= _cache_length(generation, prompts[0].shape[1] + max_new_tokens)
    before = _Before(
        vars(model).get("forward"),
        model.training,
        getattr(model.config, "use_cache", None),
        {name: getattr(generation, name, None) for name in settings},
    )
    setattr(model, _ATTRIBUTE, before)
    model.eval()
    model.config.use_cache = True  # type: ignore[union-attr]
    for name, value in settings.items():
        setattr(generation, name, value)
    if pre_compile:
        if patch_accelerate:
            make_hooks_compilable(model)
        options = _COMPILE_OPTIONS if compile_options is None else compile_options
        model.forward = _dispatching(model.forward, options, compile_prefill)
    if tokenizer is not None and getattr(tokenizer, "pad_token", None) is None:
        tokenizer.pad_token = tokenizer.eos_token
    if prompts:
        _warm_up(model, prompts, pad_token(tokenizer, end_tokens(model, tokenizer)), max_new_tokens)
    return model


def unpatch_model_for_compiled_runtime(model: nn.Module) -> nn.Module:
    """Undo `patch_model_for_compiled_runtime` and return `model`; does nothing to a model that is not patched."""
    before: _Before | None = vars(model).pop(_ATTRIBUTE, None)
    if before is None:
        return model
    vars(model).pop("forward", None)
    if before.forward is not None:
        model.forward = before.forward
    model.train(before.training)
    model.config.use_cache = before.use_cache  # type: ignore[union-attr]
    for name, value in before.generation.items():
        setattr(model.generation_config, name, value)
    return model


def _dispatching(
    forward: Callable[..., Any], options: Mapping[str, Any], compile_prefill: bool
) -> Callable[..., Any]:
    """Return `forward`, compiled for single tokens and, if asked for, for prompts."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    # Without code of its own, the forward pass would share transformers' decorators with every other model.
    decode = torch.compile(own_code(call), **options)
    prefill = forward
    if compile_prefill:
        prefill = torch.compile(own_code(call), **{**without_graphs(options), "dynamic": True})

    @functools.wraps(forward)  # transformers reads the signature
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        ids = args[0] if args else kwargs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.shape[-1] != 1:
            out = prefill(*args, **kwargs)
            if compile_prefill:
                keep_in_place(kwargs.get("past_key_values"))
            return out
        with collection_paused():  # torch.compile records a CUDA graph for every new length
            return decode(*args, **kwargs)

    return dispatch


def _warmup_prompts(tokenizer: Any, device: torch.device) -> list[Tensor]:
    """Return the tokens [1, M] of the prompts, the longest first: its cache is long enough for the others."""
    texts: tuple[str, ...] = WARMUP_PROMPTS
    if getattr(tokenizer, "chat_template", None):
        texts = tuple(in_template(tokenizer, text) for text in texts)
    ids = [tokenizer([text], return_tensors="pt")["input_ids"].to(device) for text in texts]
    return sorted(ids, key=lambda prompt: -prompt.shape[1])


def _cache_length(generation: Any, tokens: int) -> dict[str, int]:
    """Return the setting by which every cache holds `tokens` at least; empty for a transformers without it."""
    if not hasattr(generation, "max_cache_len"):
        return {}
    rounded = -(-tokens // _CACHE_STEP) * _CACHE_STEP
    return {"max_cache_len": max(rounded, generation.max_cache_len or 0)}


@torch.no_grad()
def _warm_up(model: Any, prompts: Sequence[Tensor], pad: int, max_new_tokens: int) -> None:
    for ids in prompts:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, pad_token_id=pad
        )
