"""The loop over decoding steps: until every row has ended, or the limit is reached."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

from torch import Tensor

from hqq.models.generation.decoder import Decoder
from hqq.models.generation.text_stream import TextStream, decode

# Asking a GPU after each token whether all rows have ended would keep it waiting; some tokens too many cost less.
_STEPS_BETWEEN_CHECKS = 8


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
        self._every = 1 if self._streams or decoder.token.device.type == "cpu" else _STEPS_BETWEEN_CHECKS

    def run(self, limit: int, step: Callable[[Tensor], Tensor]) -> Iterator[list[str]]:
        """Yield the new text of each row (empty unless it is read) after each of up to `limit` tokens."""
        yield self._read()
        while self._made < limit and not self._all_ended():
            step(self._decoder.token)
            self._made += 1
            yield self._read()
        yield [stream.finish() for stream in self._streams or ()]

    def _read(self) -> list[str]:
        if self._streams is None:
            return []
        pieces = [""] * len(self._streams)
        for row, token in enumerate(self._decoder.token[:, 0].tolist()):
            if row in self._ended:
                continue
            if token in self._ends:
                self._ended[row] = ("eos", self._made - 1)
                continue
            stream = self._streams[row]
            pieces[row] = stream.add(token)
            if stream.stopped:
                self._ended[row] = ("stop", self._made)
                self._decoder.finished[row] = True
        return pieces

    def _all_ended(self) -> bool:
        return self._made % self._every == 0 and bool(self._decoder.finished.all())

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
