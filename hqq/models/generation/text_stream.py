"""Text from tokens as they come, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what a decoder gives for the first bytes of a character


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of `ids` as generated, without special tokens."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


class TextStream:
    """The text of one row. What `add` and `finish` return is, one after the other, `text`.

    A piece is held back until its last character is complete and until no stop string can begin in it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # Decoders treat the first token of a text differently: decoding begins before what is new.
        self._begin = self._shown = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Take one more token and return the text that can be shown now."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._show(self._decoded(complete=True))

    def finish(self) -> str:
        """Return what was still held back: no more tokens will come."""
        if self.stopped:
            return ""
        rest = self._show(self._decoded(complete=False))
        held, self._held = self._held, ""
        self.text += held
        return rest + held

    def _decoded(self, complete: bool) -> str:
        known = decode(self._tokenizer, self._ids[self._begin : self._shown])
        text = decode(self._tokenizer, self._ids[self._begin :])
        if len(text) <= len(known) or (complete and text.endswith(_INCOMPLETE)):
            return ""
        self._begin, self._shown = self._shown, len(self._ids)
        return text[len(known) :]

    def _show(self, new: str) -> str:
        pending = self._held + new
        found = [place for place in (pending.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held, pending = True, "", pending[: min(found)]
        else:
            keep = max((_overlap(pending, stop) for stop in self._stop), default=0)
            self._held = pending[len(pending) - keep :]
            pending = pending[: len(pending) - keep]
        self.text += pending
        return pending


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` are the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
