"""What calibration works with, and how it is asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hqq.errors import ConfigError
from hqq.models.text import Tokenizer

SELF, RANDOM = "self", "random"

_DAMPING = 0.01
_RANDOM_DAMPING = 0.3
_DAMPING_OF_NOISE = 1.0


@dataclass(frozen=True)
class Calibration:
    """Which inputs layers are calibrated with, and how.

    Args:
        data: "self" (the model writes text), "random" (random token ids), a list of texts (with `tokenizer`), a tensor
            of token ids [sequences, length], a float tensor [samples, ...] of features or images, or a list of batches:
            tensors, dicts of keyword arguments or tuples of arguments, as the model takes them.
        tokenizer: turns texts into token ids.
        sequences: how many sequences of text or random ids; None for 40, or more where layers are wide.
        length: tokens in a sequence, at most the model's context.
        batch_size: sequences or samples per forward pass.
        seed: of the text or random ids.
        damping: share of the mean diagonal of a layer's second moments that is added to it; None for a share that
            falls with the number of tokens seen.
        correction: share of the error in a layer's inputs (from the quantised layers before it) that its weight is
            moved to make up for.
        folder: where finished blocks are kept, so that an interrupted run goes on from there; None for nowhere.

    Raises ConfigError for values out of range.
    """

    data: Any = SELF
    tokenizer: Tokenizer | None = None
    sequences: int | None = None
    length: int = 512
    batch_size: int = 8
    seed: int = 0
    damping: float | None = None
    correction: float = 0.75
    folder: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.data, str) and self.data not in (SELF, RANDOM):
            raise ConfigError(
                f"got calibration={self.data[:60]!r}; expected 'self', 'random', a list of texts with a tokenizer, "
                "token ids, or batches of inputs"
            )
        if not isinstance(self.data, (str, Tensor, Sequence, Mapping)) or len(self.data) == 0:
            raise ConfigError(
                f"got {type(self.data).__name__} as calibration data; expected 'self', 'random', or a list or tensor "
                "that is not empty"
            )
        if self.texts() is not None and self.tokenizer is None:
            raise ConfigError(
                "got texts to calibrate with but no tokenizer; use Calibration(texts, tokenizer=tokenizer)"
            )
        for name, least in (("sequences", 1), ("length", 2), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigError(f"got {name}={value!r}; expected a whole number of at least {least}")
        if self.damping is not None and not self.damping > 0:
            raise ConfigError(
                f"got damping={self.damping!r}; expected a number above 0 such as 0.01, or None"
            )
        if not 0 <= self.correction <= 1:
            raise ConfigError(f"got correction={self.correction!r}; expected a number from 0 to 1")

    def damping_for(self, K: int, rows: int) -> float:
        """Return the damping of second moments of `K` inputs from so many tokens.

        Few tokens leave errors in the moments of the order of K / rows; random tokens are unlike text however many.
        """
        if self.damping is not None:
            return self.damping
        least = _RANDOM_DAMPING if isinstance(self.data, str) and self.data == RANDOM else _DAMPING
        return max(least, _DAMPING_OF_NOISE * K / rows)

    def texts(self) -> list[str] | None:
        """Return the texts to calibrate with, or None if the data is something else."""
        if isinstance(self.data, (list, tuple)) and all(isinstance(text, str) for text in self.data):
            return list(self.data)
        return None


CalibrationLike = Calibration | str | Tensor | Sequence[Any] | None


def as_calibration(value: CalibrationLike) -> Calibration | None:
    """Return `value` as settings, None for none; raises ConfigError for what is no calibration data."""
    return value if value is None or isinstance(value, Calibration) else Calibration(value)
