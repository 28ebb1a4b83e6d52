"""HFGenerator: fast generation with a static cache, for causal language models of transformers."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hqq.errors import BackendError, ConfigError
from hqq.kernels.availability import device_reason, unavailable_reason
from hqq.models.generation.accelerate_hooks import make_hooks_compilable
from hqq.models.generation.compiled_runtime import (
    WARMUP_PROMPTS,
    patch_model_for_compiled_runtime,
    unpatch_model_for_compiled_runtime,
)
from hqq.models.generation.compiling import without_graphs
from hqq.models.generation.decoder import Decoder
from hqq.models.generation.family import Family, take_apart
from hqq.models.generation.loop import Loop, end_of
from hqq.models.generation.prompts import Prompt, encode, left_padded, pad_token
from hqq.models.generation.sampling import Sampling
from hqq.models.generation.text_stream import decode
from hqq.models.generation.transformers_cache import context_length, end_tokens
from hqq.models.progress import progress_bar
from hqq.models.text import model_device

__all__ = [
    "WARMUP_PROMPTS",
    "HFGenerator",
    "patch_model_for_compiled_runtime",
    "unpatch_model_for_compiled_runtime",
]

_RESULT = ("output_text", "output_tokens", "input_tokens", "finish_reason")
_SMALLEST_CACHE = 64

_logger = logging.getLogger(__name__)

_STEPS = ("auto", "fused", "transformers")
_COMPILE_MODES = (None, "partial", "full")
_COMPILE_OPTIONS: Mapping[str, Any] = {"mode": "reduce-overhead", "fullgraph": True}


class HFGenerator:
    """Generates text with a causal language model of transformers, quantised or not, on any device.

    The cache has a fixed size, so that a decoding step is the same graph each time: run as it is, compiled by
    torch.compile without a graph break, or repeated as a CUDA graph (`enable_cuda_graph`). On CUDA, models of the Llama
    family have a fused step of few kernels, which is a CUDA graph by itself. Greedy generation gives the tokens that
    the model's own `generate` gives.

    Args:
        model: where its parameters are is where it runs; it is put into eval mode.
        tokenizer: encodes prompts and decodes tokens; it is not changed.
        max_new_tokens: where a text stops, if the model does not end it earlier.
        cache_size: tokens that the cache holds, prompt and new ones; None takes the next power of two that suffices,
            and a larger one (compiled again) when a prompt needs it.
        do_sample: draw tokens; False takes the likeliest one each time, and `temperature` and `top_k` do nothing.
        temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`.
        compile: None, "partial" (the decoding step) or "full" (the pass over the prompt as well).
        compile_options: arguments of torch.compile; default mode="reduce-overhead", fullgraph=True.
        patch_accelerate: before compiling, let the hooks of a model that accelerate dispatched compile.
        seed: of the sampling: each call of `generate` starts from it. None draws a new one for the generator.
        stop: strings that end a text, and are not part of it.
        eos_token_id: tokens that end a text; None takes the model's.
        step: "fused", "transformers" (the model's own forward pass), or "auto": fused where it can be. `step_reason`
            says why it is not.

    Raises ConfigError for arguments out of range, and BackendError for step="fused" where that cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        max_new_tokens: int = 1000,
        cache_size: int | None = None,
        do_sample: bool = False,
        temperature: float = 0.6,
        top_k: int | None = 5,
        compile: str | None = None,  # noqa: A002 - the original's name
        compile_options: Mapping[str, Any] | None = None,
        patch_accelerate: bool = True,
        *,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        eos_token_id: int | Sequence[int] | None = None,
        step: str = "auto",
    ) -> None:
        if compile not in _COMPILE_MODES:
            raise ConfigError(f'got compile={compile!r}; expected None, "partial" or "full"')
        if step not in _STEPS:
            raise ConfigError(f"got step={step!r}; expected one of {', '.join(map(repr, _STEPS))}")
        if not do_sample and (top_p is not None or min_p is not None or seed is not None):
            raise ConfigError(
                "got top_p, min_p or seed without sampling; pass do_sample=True, or leave them out"
            )
        for name, value in (("max_new_tokens", max_new_tokens), ("cache_size", cache_size)):
            if value is not None and value < 1:
                raise ConfigError(f"got {name}={value}; expected at least 1")
        if compile is not None and patch_accelerate:
            make_hooks_compilable(model)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.device = model_device(model)
        self.max_new_tokens, self.cache_size = max_new_tokens, cache_size
        self.sampling = Sampling(do_sample, repetition_penalty, temperature, top_k or None, top_p, min_p)
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(self.stop):
            raise ConfigError("got an empty stop string; leave it out")
        ends = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
        self.ends = end_tokens(model, tokenizer) if ends is None else list(ends)
        self.seed = seed
        self._generator = torch.Generator(self.device) if self.sampling.draws else None
        if self._generator is not None and seed is None:
            self._generator.seed()
        self._compile = compile
        self._compile_options = dict(_COMPILE_OPTIONS if compile_options is None else compile_options)
        self._graphs = False
        self._wanted = step
        self._family, self.step_reason = self._parts(step)
        self._decoder: Decoder | None = None
        self._inputs: tuple[Tensor, Tensor] | None = None

    # Generating

    def generate(
        self,
        prompt: Prompt,
        use_chat_template: bool = True,
        verbose: bool = True,
        print_tokens: bool = False,
        *,
        max_new_tokens: int | None = None,
    ) -> dict[str, Any]:
        """Return how the model goes on after `prompt`: a str, or a list of them, which are then one batch.

        verbose shows a progress bar on a terminal; print_tokens writes the text of a single prompt as it comes.

        The dict has `output_text` (without the prompt and special tokens), `output_tokens` and `input_tokens` (1-D
        tensors on the CPU, without padding and the token that ended the text) and `finish_reason` ("eos", "stop" or
        "length"); for a list of prompts, a list of each.

        Raises ConfigError for a prompt that is empty or leaves no room for max_new_tokens in the cache or the model's
        context, and for use_chat_template with a tokenizer that has none.
        """
        limit = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        if print_tokens and not isinstance(prompt, str):
            raise ConfigError(
                "got print_tokens=True with several prompts; expected one, or use stream(prompts)"
            )
        self.setup(self.tokenize_prompt(prompt, use_chat_template), limit)
        result = self._finish(self.prefill(), limit, verbose, print_tokens)
        return _only_row(result) if isinstance(prompt, str) else result

    def stream(
        self, prompt: Prompt, use_chat_template: bool = True, *, max_new_tokens: int | None = None
    ) -> Iterator[Any]:
        """Yield the text after `prompt` in pieces as they come; for a list of prompts, a list of pieces each time.

        The pieces together are `output_text` of `generate`. Raises what `generate` raises.
        """
        limit = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        self.setup(self.tokenize_prompt(prompt, use_chat_template), limit)
        self.prefill()
        for pieces in self._loop(watch=True).run(limit, self.gen_next_token):
            if any(pieces):
                yield pieces[0] if isinstance(prompt, str) else pieces

    def generate_(
        self,
        prompt: Prompt,
        use_chat_template: bool = True,
        verbose: bool = False,
        print_tokens: bool = False,
    ) -> dict[str, Any]:
        """Generate through the model's own `generate` with a static cache, by the same settings.

        verbose and print_tokens do nothing. Returns what `generate` returns. Raises ConfigError if there are stop
        strings, which the two treat differently.
        """
        if self.stop:
            raise ConfigError(f"got stop={self.stop!r}, which generate_ does not take; use generate")
        inputs = self.tokenize_prompt(prompt, use_chat_template)
        options = self._transformers_options()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices, enabled=self.seed is not None):
            if self.seed is not None:
                torch.manual_seed(self.seed)
            output = self.model.generate(**inputs, **options)  # type: ignore[operator]
        rows: dict[str, list[Any]] = {key: [] for key in _RESULT}
        for ids, mask, made in zip(
            inputs["input_ids"].cpu(),
            inputs["attention_mask"].cpu(),
            output[:, inputs["input_ids"].shape[1] :].cpu(),
            strict=True,
        ):
            reason, count = end_of(made.tolist(), self.ends)
            values = decode(self.tokenizer, made[:count].tolist()), made[:count], ids[mask.bool()], reason
            for key, value in zip(_RESULT, values, strict=True):
                rows[key].append(value)
        return _only_row(rows) if isinstance(prompt, str) else rows

    def _transformers_options(self) -> dict[str, Any]:
        sampling = self.sampling
        options: dict[str, Any] = {
            "do_sample": sampling.draws,
            "temperature": None,
            "top_k": None,
            "top_p": None,
        }
        if sampling.draws:
            options |= {
                "temperature": sampling.temperature,
                "top_k": sampling.top_k or 0,
                "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
                "min_p": sampling.min_p,
            }
        return {
            **options,
            "repetition_penalty": sampling.repetition_penalty or 1.0,
            "max_new_tokens": self.max_new_tokens,
            "eos_token_id": self.ends or None,
            "pad_token_id": pad_token(self.tokenizer, self.ends),
            "cache_implementation": "static",
        }

    def warmup(self, max_samples: int = -1) -> HFGenerator:
        """Generate a little, so that what is compiled or recorded at the first calls is done; returns self."""
        prompts = WARMUP_PROMPTS[:max_samples] if max_samples > 0 else WARMUP_PROMPTS
        for prompt in prompts:
            template = bool(getattr(self.tokenizer, "chat_template", None))
            self.setup(self.tokenize_prompt(prompt, template), self.max_new_tokens)
            self.next_token_iterator(
                self.prefill(), min(self.max_new_tokens, 8), verbose=False, print_tokens=False
            )
        return self

    def enable_cuda_graph(self) -> HFGenerator:
        """Record the decoding step as a CUDA graph and repeat it from now on; returns self.

        Raises BackendError for a model that is not on one CUDA device, or has a cache that cannot be recorded.
        """
        self._graphs, self._decoder = True, None
        try:
            return self.warmup(1)
        except BaseException:
            self._graphs, self._decoder = False, None
            raise

    # The steps of it, for callers with a loop of their own

    def tokenize_prompt(self, prompt: Prompt, use_chat_template: bool = True) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask` [B, M] of the prompts, padded on the left, on the model's device."""
        batch = encode(self.tokenizer, prompt, use_chat_template)
        return left_padded(batch, pad_token(self.tokenizer, self.ends), self.device)

    def setup(self, inputs: Mapping[str, Tensor], max_new_tokens: int) -> None:
        """Make `inputs` (of `tokenize_prompt`) the texts to continue by up to `max_new_tokens` tokens.

        Raises ConfigError if they do not fit the cache or the model's context.
        """
        input_ids, mask = inputs["input_ids"], inputs["attention_mask"]
        batch, tokens = input_ids.shape
        length = self._length(tokens, max_new_tokens)
        decoder = self._decoder
        if decoder is None or decoder.batch != batch or decoder.length < length:
            if decoder is not None:
                self._decoder = decoder = None
                gc.collect()  # or two caches would be there at a time: a decoder refers to itself
            self._decoder = self._new_decoder(batch, length)
        self._inputs = input_ids, mask

    def prefill(self) -> Tensor:
        """Run the prompts through the model and return the first new tokens [B, 1]."""
        if self._generator is not None and self.seed is not None:
            self._generator.manual_seed(self.seed)
        decoder, inputs = self._ready(), self._inputs
        assert inputs is not None
        return decoder.start(*inputs)

    def gen_next_token(self, next_token: Tensor) -> Tensor:
        """Feed `next_token` [B, 1] and return the tokens that follow, in a buffer that the next call overwrites."""
        decoder = self._ready()
        if next_token is not decoder.token:
            decoder.token.copy_(next_token)
        return decoder.step()

    def next_token_iterator(
        self, next_token: Tensor, max_new_tokens: int, verbose: bool, print_tokens: bool, cleanup: bool = True
    ) -> dict[str, Any]:
        """Go on after `prefill`, which returned `next_token`, and return what `generate` returns.

        max_new_tokens counts `next_token`. cleanup forgets the prompt; the cache keeps its memory.
        """
        result = self._finish(next_token, max_new_tokens, verbose, print_tokens)
        if cleanup:
            self._inputs = None
        return result if len(next_token) > 1 else _only_row(result)

    def reset_cache(self) -> None:
        """Empty the cache; its memory stays."""
        if self._decoder is not None:
            self._decoder.model.reset()

    # Inside

    def _ready(self) -> Decoder:
        if self._decoder is None or self._inputs is None:
            raise ConfigError(
                "got a step without texts to continue; call setup(tokenize_prompt(...), ...) first"
            )
        return self._decoder

    def _loop(self, watch: bool) -> Loop:
        decoder, inputs = self._ready(), self._inputs
        assert inputs is not None
        return Loop(decoder, inputs, self.tokenizer, self.ends, self.stop, watch)

    def _finish(
        self, next_token: Tensor, limit: int, verbose: bool, print_tokens: bool
    ) -> dict[str, list[Any]]:
        decoder = self._ready()
        if next_token is not decoder.token:
            decoder.token.copy_(next_token)
        loop = self._loop(watch=print_tokens)
        with progress_bar(limit, "Generating", verbose and not print_tokens, unit="token") as bar:
            for pieces in loop.run(limit, self.gen_next_token):
                bar.update()
                if print_tokens:
                    sys.stdout.write(pieces[0])
                    sys.stdout.flush()
        return loop.result()

    def _length(self, tokens: int, limit: int) -> int:
        """Return the cache length for a prompt of `tokens` and `limit` new ones; raises ConfigError if none will do."""
        if limit < 1:
            raise ConfigError(f"got max_new_tokens={limit}; expected at least 1")
        context = context_length(self.model)
        for holder, room in (("cache_size", self.cache_size), ("the model's context", context)):
            if room is not None and tokens + limit > room:
                left = room - tokens
                advice = f"use max_new_tokens={left} or less" if left > 0 else "shorten the prompt"
                raise ConfigError(
                    f"got a prompt of {tokens} tokens and max_new_tokens={limit}; {holder} holds {room}: {advice}"
                )
        if self.cache_size is not None:
            return self.cache_size
        power = max(_SMALLEST_CACHE, 1 << (tokens + limit - 1).bit_length())
        return power if context is None else min(power, context)

    def _parts(self, step: str) -> tuple[Family | None, str | None]:
        """Return the parts of the model for the fused step, or None and the reason why it has none."""
        reason: str | None
        if step == "transformers":
            return None, 'step="transformers" was asked for'
        if self._compile is not None:
            reason = f"compile={self._compile!r} was asked for"
        elif step == "auto" and self.device.type != "cuda":
            return None, f"the model is on {self.device}"
        else:
            reason = unavailable_reason() or device_reason(self.device)
        if reason is None:
            try:
                return take_apart(self.model), None
            except BackendError as error:
                reason = str(error)
        if step == "fused":
            raise BackendError(f"got step='fused', which cannot be: {reason}")
        _logger.info("decoding with the model's own forward pass: %s", reason)
        return None, reason

    def _new_decoder(self, batch: int, length: int) -> Decoder:
        pad = pad_token(self.tokenizer, self.ends)
        decoder = Decoder(
            self.model, batch, length, self.device, self.sampling, self.ends, pad, self._generator
        )
        if self._fuse(decoder):
            return decoder
        options = without_graphs(self._compile_options) if self._graphs else self._compile_options
        if self._compile == "full":
            decoder.compile_prefill(options)
        if self._compile is not None:
            decoder.compile_step(options)
        if self._graphs:
            decoder.capture_next()
        return decoder

    def _fuse(self, decoder: Decoder) -> bool:
        """Give `decoder` the fused step, as a CUDA graph where there is CUDA; returns whether it has it."""
        if self._family is None:
            return False
        try:
            decoder.fuse(self._family)
        except BackendError as error:
            if self._wanted == "fused":
                raise
            self._family, self.step_reason = None, str(error)
            _logger.info("decoding with the model's own forward pass: %s", error)
            return False
        if self.device.type == "cuda":
            decoder.capture_next()
        return True


def _only_row(result: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    return {key: values[0] for key, values in result.items()}
