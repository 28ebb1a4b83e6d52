"""Making the `generate` of a transformers model run with a static cache and a compiled decoding step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hqq.errors import ConfigError
from hqq.models.generation.accelerate_hooks import make_hooks_compilable
from hqq.models.generation.decoder import without_graphs
from hqq.models.generation.prompts import in_template, pad_token
from hqq.models.generation.transformers_cache import end_tokens
from hqq.models.text import model_device

WARMUP_PROMPTS = (
    "Describe what a compiler does.",
    "Name three rivers and the seas they end in.",
    "def mean(values):",
    "Once upon a time there was a very small computer that",
    "Why is the sky blue?",
)

_ATTRIBUTE = "_hqq_compiled_runtime"
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
        max_new_tokens: of the warm-up. Cache and graph fit calls with as many tokens; others may compile again.
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
    settings = {"cache_implementation": "static", **({"disable_compile": True} if pre_compile else {})}
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
    if tokenizer is not None:
        if getattr(tokenizer, "pad_token", None) is None:
            tokenizer.pad_token = tokenizer.eos_token
        if warmup:
            _warm_up(model, tokenizer, max_new_tokens)
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
    decode = torch.compile(forward, **options)
    prefill = (
        torch.compile(forward, **{**without_graphs(options), "dynamic": True}) if compile_prefill else forward
    )

    @functools.wraps(forward)  # transformers reads the signature
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        ids = args[0] if args else kwargs.get("input_ids")
        one = isinstance(ids, Tensor) and ids.shape[-1] == 1
        return (decode if one else prefill)(*args, **kwargs)

    return dispatch


@torch.no_grad()
def _warm_up(model: Any, tokenizer: Any, max_new_tokens: int) -> None:
    device, pad = model_device(model), pad_token(tokenizer, end_tokens(model, tokenizer))
    for prompt in WARMUP_PROMPTS:
        text = in_template(tokenizer, prompt) if getattr(tokenizer, "chat_template", None) else prompt
        ids = tokenizer([text], return_tensors="pt")["input_ids"].to(device)
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, pad_token_id=pad
        )
