"""The loop over decoding steps: until every row has ended, or the limit is reached."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hqq.models.generation.decoder import Decoder
from hqq.models.generation.text_stream import TextStream, decode

# A GPU would stand still from the end of a step until the host has read it and asked for the next one. So the host
# reads while further steps are under way, and without texts to read only every so many. Some steps too many cost less.
_STEPS_BETWEEN_CHECKS = 8


class _Note:
    """The tokens [B] of one step, and whether all rows have ended, on their way to the host."""

    def __init__(self, decoder: Decoder, number: int) -> None:
        self.number = number
        on_gpu = decoder.token.device.type == "cuda"
        made = (decoder.token[:, 0], decoder.finished.all())
        self._tokens, self._over = (tensor.to("cpu", non_blocking=on_gpu, copy=True) for tensor in made)
        self._event = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(decoder.token.device))

    def read(self) -> tuple[list[int], bool]:
        """Wait for the step, and return its tokens and whether all rows have ended."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens.tolist(), bool(self._over)


class Loop:
    """The texts of one batch in the making, from the token that follows the prompts on.

    Args:
        decoder: has run the prompts.
        inputs: the prompts' `input_ids` and `attention_mask` [B, M].
        tokenizer, ends, stop: how tokens are read, and what ends a row.
        watch: read the text of every step, which stop strings need anyway.
    """

    def __init__(
        self,
        decoder: Decoder,
        inputs: tuple[Tensor, Tensor],
        tokenizer: Any,
        ends: Sequence[int],
        stop: Sequence[str] = (),
        watch: bool = False,
    ) -> None:
        self._decoder, self._inputs, self._tokenizer, self._ends = decoder, inputs, tokenizer, frozenset(ends)
        self._streams = [TextStream(tokenizer, stop) for _ in range(decoder.batch)] if watch or stop else None
        self._ended: dict[int, tuple[str, int]] = {}  # row -> why, and how many new tokens it has
        self._made = 1
        on_gpu = decoder.token.device.type == "cuda"
        self._every = 1 if self._streams or not on_gpu else _STEPS_BETWEEN_CHECKS
        self._ahead = self._every if on_gpu else 0

    def run(self, limit: int, step: Callable[[Tensor], Tensor]) -> Iterator[list[str]]:
        """Yield the new text of each row (empty unless it is read) after each of up to `limit` tokens."""
        under_way: deque[_Note | None] = deque([self._note()])
        over = False
        while not over and (under_way or self._made < limit):
            while self._made < limit and len(under_way) <= self._ahead:
                step(self._decoder.token)
                self._made += 1
                under_way.append(self._note())
            note = under_way.popleft()
            if note is None:
                yield []
                continue
            tokens, over = note.read()
            yield self._read(tokens, note.number)
            over = over or len(self._ended) == len(tokens)
        yield [stream.finish() for stream in self._streams or ()]

    def _note(self) -> _Note | None:
        return _Note(self._decoder, self._made) if self._made % self._every == 0 else None

    def _read(self, tokens: Sequence[int], number: int) -> list[str]:
        """Take the tokens of step `number` and return the new text of each row."""
        if self._streams is None:
            return []
        pieces = [""] * len(self._streams)
        for row, token in enumerate(tokens):
            if row in self._ended:
                continue
            if token in self._ends:
                self._ended[row] = ("eos", number - 1)
                continue
            stream = self._streams[row]
            pieces[row] = stream.add(token)
            if stream.stopped:
                self._ended[row] = ("stop", number)
                self._decoder.finished[row] = True
        return pieces

    def result(self) -> dict[str, Any]:
        """Return, for each row, `output_text`, `output_tokens`, `input_tokens` and `finish_reason`."""
        input_ids, mask = (tensor.cpu() for tensor in self._inputs)
        begin = input_ids.shape[1]
        made = self._decoder.ids[:, begin : begin + self._made].cpu()
        rows: dict[str, list[Any]] = {
            "output_text": [],
            "output_tokens": [],
            "input_tokens": [ids[there.bool()] for ids, there in zip(input_ids, mask, strict=True)],
            "finish_reason": [],
        }
        for row, tokens in enumerate(made):
            reason, count = self._ended.get(row) or end_of(tokens.tolist(), self._ends)
            stream = self._streams[row] if self._streams else None
            kept = tokens[:count].clone()
            text = stream.text if stream and reason == "stop" else decode(self._tokenizer, kept.tolist())
            rows["output_text"].append(text)
            rows["output_tokens"].append(kept)
            rows["finish_reason"].append(reason)
        return rows


def end_of(tokens: Sequence[int], ends: Container[int]) -> tuple[str, int]:
    """Return why a row of new tokens ended, and how many of them are text."""
    end = next((index for index, token in enumerate(tokens) if token in ends), None)
    return ("length", len(tokens)) if end is None else ("eos", end)
