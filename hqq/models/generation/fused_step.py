"""The fused decoding step: a token for each row through a model of the Llama family, in few kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hqq.backends.merge import Projections
from hqq.errors import BackendError
from hqq.kernels.decode_advance import Rows
from hqq.kernels.decode_attention import AttentionSpace, HeadNorm, decode_attention
from hqq.kernels.decode_choose import ChoiceSpace, choose_next
from hqq.kernels.decode_logits import Filters
from hqq.kernels.decode_prompt import prompt_heads
from hqq.models.generation.family import Family, Layer
from hqq.models.generation.products import Stream
from hqq.models.generation.prompt_attention import attend, prompt_mask
from hqq.models.generation.prompt_graphs import PromptGraphs
from hqq.models.generation.sampling import Sampling


@dataclass(frozen=True)
class _Layer:
    """A layer with its projections joined where they can be, and its part of the cache."""

    layer: Layer
    qkv: Projections
    o: Projections
    gate_up: Projections
    down: Projections
    heads: HeadNorm | None
    keys: Tensor
    values: Tensor


# Layer, queries, keys and values of its projections -> the attention's result.
Attention = Callable[[_Layer, Tensor, Tensor, Tensor], Tensor]


class FusedStep:
    """The step for a batch of texts in a static cache, and the pass over their prompts that begins to fill it.

    Four products and two kernels of attention for each layer, and the products bring norms, gate and sums along where
    they are those of prepared weights; everything that a step reads or writes stays in place, so that a CUDA graph can
    repeat it.

    Args:
        family: the model.
        cache: keys and values [B, KV, length, D] of each layer.

    Attributes:
        begins, positions: int32 [B]: where in the cache the text of a row begins, and where its next token goes.

    Raises BackendError for a cache that does not fit the model.
    """

    def __init__(self, family: Family, cache: Sequence[tuple[Tensor, Tensor]]) -> None:
        keys = cache[0][0]
        for layer in (tensor for pair in cache for tensor in pair):
            if layer.shape != keys.shape or layer.dtype != family.dtype or not layer.is_contiguous():
                raise BackendError(
                    f"got a cache of {layer.dtype} {tuple(layer.shape)}; the fused decoding step takes contiguous "
                    f"{family.dtype} of one shape"
                )
        batch, kv_heads, length, head = keys.shape
        device = family.device
        self._family = family
        self._layers = [_with_cache(layer, *pair) for layer, pair in zip(family.layers, cache, strict=True)]
        self._to_logits = Projections((family.head,))
        self._cos, self._sin = family.rotation(length)
        self._space = AttentionSpace.make(batch, kv_heads, family.heads // kv_heads, head, length, device)
        self._space_to_choose: ChoiceSpace | None = None
        self._prompts = PromptGraphs(self._pass, length)
        self.begins = torch.zeros(batch, dtype=torch.int32, device=device)
        self.positions = torch.zeros(batch, dtype=torch.int32, device=device)

    def prompt(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Take up prompts [B, M], padded on the left as the mask [B, M] says; return the logits [B, V] after them."""
        tokens = input_ids.shape[1]
        self.begins.copy_(tokens - attention_mask.sum(1))
        self.positions.fill_(tokens)
        return self._prompts(input_ids, bool(self.begins.any()))

    def forget_prompts(self) -> None:
        """Forget which lengths there were, and what was recorded for them."""
        self._prompts.clear()

    def _pass(self, input_ids: Tensor, last: Tensor, padded: bool) -> Tensor:
        """Return the logits [B, V] after the tokens `last` [B] of all; see `PromptGraphs`."""
        rows, tokens = input_ids.shape
        masks: dict[int | None, Tensor | None] = {}

        def attention(layer: _Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            window = layer.layer.window
            if window not in masks:
                needed = padded or (window is not None and window < tokens)
                masks[window] = prompt_mask(self.begins, tokens, window) if needed else None
            cache = (layer.keys, layer.values)
            turned = prompt_heads(q, k, v, *cache, self._cos, self._sin, self.begins, layer.heads)
            queries = turned.view(rows, tokens, self._family.heads, -1).transpose(1, 2)
            keys, values = (part[:, :, :tokens] for part in cache)
            result = attend(queries, keys, values, masks[window], self._family.scale)
            return result.transpose(1, 2).reshape(rows * tokens, -1)

        return self._head(self._through(input_ids.reshape(-1), attention).at(last))

    def logits(self, token: Tensor) -> Tensor:
        """Return the logits [B, V] after `token` [B, 1], which is in the cache then; `positions` stay as they are."""
        return self._head(self._through(token[:, 0], self._attention))

    def _through(self, tokens: Tensor, attention: Attention) -> Stream:
        """Return what `tokens` [T] have become after all layers."""
        stream = Stream(self._family.embedding(tokens))
        for layer in self._layers:
            heads = stream.project(layer.layer.before_attention, layer.qkv)
            stream = stream.plus(attention(layer, *heads), layer.o)
            stream = stream.plus(stream.gated(layer.layer.before_mlp, layer.gate_up), layer.down)
        return stream

    def _head(self, stream: Stream) -> Tensor:
        (logits,) = stream.project(self._family.norm, self._to_logits)
        return logits

    def advance(
        self, logits: Tensor, rows: Rows, sampling: Sampling, noise: Tensor | None, seen: Tensor | None
    ) -> None:
        """Choose the next token of each row by `logits` as `sampling` says, and move on.

        noise and seen [B, V]: see `Sampling`.
        """
        if self._space_to_choose is None:
            self._space_to_choose = ChoiceSpace.make(logits.shape[0], logits.shape[1], logits.device)
        filters = Filters(
            draw=sampling.draws,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            penalty=sampling.repetition_penalty if sampling.remembers else None,
        )
        choose_next(logits, rows, filters, noise, seen, self._space_to_choose)

    def _attention(self, layer: _Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return decode_attention(
            q,
            k,
            v,
            layer.keys,
            layer.values,
            self._cos,
            self._sin,
            self.begins,
            self.positions,
            self._family.scale,
            self._space,
            layer.heads,
            layer.layer.window,
        )


def _with_cache(layer: Layer, keys: Tensor, values: Tensor) -> _Layer:
    heads = None
    if layer.q_norm is not None and layer.k_norm is not None:
        heads = HeadNorm(layer.q_norm.weight, layer.k_norm.weight, layer.q_norm.eps)
    qkv, o, gate_up, down = map(Projections, (layer.qkv, (layer.o,), layer.gate_up, (layer.down,)))
    return _Layer(layer, qkv, o, gate_up, down, heads, keys, values)
