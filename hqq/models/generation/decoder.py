"""One decoding step over buffers that stay in place: run as it is, compiled, or repeated as a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hqq.errors import ConfigError
from hqq.models.generation.compiling import Compile, collection_paused, own_code, without_graphs
from hqq.models.generation.sampling import Sampling
from hqq.models.generation.transformers_cache import CachedModel, empty_mask, vocabulary_size

if TYPE_CHECKING:
    from hqq.kernels.decode_advance import Rows
    from hqq.models.generation.family import Family
    from hqq.models.generation.fused_step import FusedStep


class Decoder:
    """The state of a batch of `batch` texts of up to `length` tokens, and the step that adds a token to each.

    Every tensor that a step reads or writes lives here and is changed in place: one graph serves all steps and all
    prompts.

    Args:
        model: a causal language model of transformers.
        batch, length: rows, and positions of the static cache.
        device: where tokens go and come from.
        sampling: how tokens are chosen; `generator` draws the random numbers for it.
        ends, pad: tokens that end a row, and the token that follows them.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: int,
        length: int,
        device: torch.device,
        sampling: Sampling,
        ends: Sequence[int],
        pad: int,
        generator: torch.Generator | None = None,
    ) -> None:
        self.model, self.sampling, self.pad, self.generator = (
            CachedModel(model, length),
            sampling,
            pad,
            generator,
        )
        self.batch, self.length = batch, length
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position_ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.cache_position = torch.zeros(1, dtype=torch.long, device=device)
        self.attention_mask = empty_mask(batch, length, device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        # Prompt and new tokens; the last token needs no place in the cache.
        self.ids = torch.zeros(batch, length + 1, dtype=torch.long, device=device)
        self._ends = torch.tensor(list(ends), dtype=torch.long, device=device)
        shape = (batch, vocabulary_size(model))
        self._noise = torch.ones(shape, device=device) if sampling.draws else None
        self._seen = torch.zeros(shape, dtype=torch.bool, device=device) if sampling.remembers else None
        self._prefill: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = self.model
        self._step: Callable[[], None] = self._one_step
        self._graph: torch.cuda.CUDAGraph | None = None
        self._room = 0
        self._to_capture = self._compiled = False
        self._fused: FusedStep | None = None
        self._rows: Rows | None = None

    # How it runs

    def compile_step(self, options: Compile) -> None:
        """Compile the step with torch.compile's `options`; the first call does the work."""
        for buffer in self._buffers():
            # Or the graphs that torch.compile records would copy what the step changes in place.
            torch._dynamo.mark_static_address(buffer)
        self._step = torch.compile(own_code(self._one_step), **{"dynamic": False, **options})
        self._compiled = True

    def compile_prefill(self, options: Compile) -> None:
        """Compile the pass over the prompt as well, for all prompt lengths."""
        options = {**without_graphs(options), "dynamic": True}
        self._prefill = torch.compile(own_code(self.model.__call__), **options)
        self._allocate()

    def fuse(self, family: Family) -> None:
        """Decode with the fused step, which needs Triton, and read prompts with its kernels as well.

        family: the parts of the model. Raises BackendError for a cache that the fused step does not take.
        """
        from hqq.kernels.decode_advance import Rows
        from hqq.models.generation.fused_step import FusedStep

        self._allocate()
        self._fused = FusedStep(family, self.model.tensors())
        self._rows = Rows(self.token, self.finished, self.ids, self._fused.positions, self._ends, self.pad)
        self._step = self._fused_step

    def capture_next(self) -> None:
        """Record the next step as a CUDA graph and repeat that from then on; raises BackendError if it cannot be."""
        if self._fused is None:
            self.model.check_capturable(self._compiled)
        self._to_capture = True

    @torch.no_grad()
    def _allocate(self) -> None:
        """Have the cache allocate itself now: tensors made inside a compiled graph may not outlive the call."""
        one = torch.zeros(self.batch, 1, dtype=torch.long, device=self.token.device)
        self.model(one, one + 1, one, one[0])
        self.model.reset()

    # What it does

    @torch.no_grad()
    def start(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Begin with a left-padded batch of prompts [B, M] and return the tokens [B, 1] that follow them."""
        tokens = input_ids.shape[1]
        self._room = self.length - tokens
        self.finished.zero_()
        self.attention_mask.zero_()
        self.attention_mask[:, :tokens] = attention_mask
        self.ids.fill_(self.pad)
        self.ids[:, :tokens] = input_ids
        # Padding gets position 0, which nothing attends to.
        positions = (attention_mask.cumsum(1) - 1).clamp_min(0)
        if self._seen is not None:
            self._seen.zero_()
            there = torch.zeros_like(self._seen, dtype=torch.long)
            self._seen.copy_(there.scatter_add(1, input_ids, attention_mask) > 0)
        self._draw()
        if self._fused is not None:
            logits = self._fused.prompt(input_ids, attention_mask)
        else:
            self.model.reset()
            where = torch.arange(tokens, device=input_ids.device)
            logits = self._prefill(input_ids, attention_mask, positions, where)
        self.position_ids.copy_(positions[:, -1:])
        self.cache_position.fill_(tokens - 1)
        self._advance(logits)
        return self.token

    @torch.no_grad()
    def step(self) -> Tensor:
        """Feed `token` and return the tokens [B, 1] that follow, which are in `token` then.

        Raises ConfigError if the cache is full.
        """
        if self._room <= 0:
            raise ConfigError(
                f"got a step beyond the cache of {self.length} tokens; set up with a larger max_new_tokens"
            )
        self._room -= 1
        self._draw()
        if self._to_capture:
            with torch.cuda.device(self.token.device):  # whose streams the step runs on
                self._capture()
        if self._graph is not None:
            self._graph.replay()
        elif self._compiled:
            with collection_paused():  # torch.compile may record a CUDA graph in any of the first calls
                self._step()
        else:
            self._step()
        return self.token

    def _one_step(self) -> None:
        self.attention_mask.index_fill_(1, self.cache_position, 1)
        self._advance(self.model(self.token, self.attention_mask, self.position_ids, self.cache_position))

    def _fused_step(self) -> None:
        fused, rows = self._fused, self._rows
        assert fused is not None and rows is not None
        fused.advance(fused.logits(self.token), rows, self.sampling, self._noise, self._seen)

    def _advance(self, logits: Tensor) -> None:
        """Choose a token for each row by `logits` [B, V] and make it the next one to feed."""
        token = self.sampling.choose(logits.to(self.token.device), self._noise, self._seen)
        if self._seen is not None:
            self._seen.scatter_(1, token, True)
        token = torch.where(self.finished[:, None], self.pad, token)
        self.finished.logical_or_((token == self._ends).any(-1))
        self.token.copy_(token)
        self.position_ids.add_(1)
        self.cache_position.add_(1)
        self.ids.index_copy_(1, self.cache_position, token)

    def _draw(self) -> None:
        if self._noise is not None:
            self._noise.exponential_(generator=self.generator)

    # CUDA graphs

    def _buffers(self) -> list[Tensor]:
        optional = [buffer for buffer in (self._noise, self._seen) if buffer is not None]
        state = [
            self.token,
            self.position_ids,
            self.cache_position,
            self.attention_mask,
            self.finished,
            self.ids,
        ]
        if self._fused is not None:
            optional.append(self._fused.positions)
        return state + optional

    def _capture(self) -> None:
        """Record the step. Trying it and recording it change the state, which is put back."""
        kept = [(buffer, buffer.clone()) for buffer in (*self._buffers(), *self.model.lengths())]

        def put_back() -> None:
            for buffer, value in kept:
                buffer.copy_(value)

        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # what is compiled, tuned or allocated at the first calls must not be recorded
                self._step()
                put_back()
        torch.cuda.current_stream().wait_stream(stream)
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        with collection_paused(), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._step()
        put_back()
        self._graph, self._to_capture = graph, False
