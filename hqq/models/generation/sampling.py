"""From logits to the next token: pure tensor operations that torch.compile and CUDA graphs take as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hqq.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The filters apply in the order of the fields.

    Args:
        do_sample: draw the token; False takes the likeliest one, and the fields below but for the first do nothing.
        repetition_penalty: divides positive and multiplies negative logits of tokens that were there already (Keskar
            et al. 2019).
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens.
        top_p: keep the likeliest tokens that together reach this probability (Holtzman et al. 2020).
        min_p: keep the tokens with at least this share of the likeliest one's probability (Nguyen et al. 2024).

    Raises ConfigError for values out of range.
    """

    do_sample: bool = False
    repetition_penalty: float | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if self.repetition_penalty is not None and self.repetition_penalty <= 0:
            raise ConfigError(
                f"got repetition_penalty={self.repetition_penalty}; expected above 0, 1 for none"
            )
        if self.temperature < 0:
            raise ConfigError(f"got temperature={self.temperature}; expected 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"got top_k={self.top_k}; expected at least 1, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"got top_p={self.top_p}; expected above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ConfigError(f"got min_p={self.min_p}; expected from 0 to 1")

    @property
    def draws(self) -> bool:
        """Whether the choice needs random numbers."""
        return self.do_sample and self.temperature > 0

    @property
    def remembers(self) -> bool:
        """Whether the choice depends on which tokens were there already."""
        return self.repetition_penalty not in (None, 1)

    def scores(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return `logits` [B, V] (float32) after the filters; tokens that cannot be drawn have -inf.

        seen [B, V] (bool) marks the tokens that were there already; needed if `remembers`.
        """
        if self.remembers and seen is not None:
            penalty = self.repetition_penalty
            assert penalty is not None
            logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if not self.draws:
            return logits
        logits = logits / self.temperature
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = logits.sort(descending=True)
            probabilities = ordered.softmax(-1)
            # What stands before a token reaches top_p without it; nothing stands before the likeliest one.
            enough = probabilities.cumsum(-1) - probabilities >= self.top_p
            logits = logits.masked_fill(torch.zeros_like(enough).scatter(-1, order, enough), -torch.inf)
        if self.min_p is not None:
            probabilities = logits.softmax(-1)
            least = probabilities.amax(-1, keepdim=True) * self.min_p
            logits = logits.masked_fill(probabilities < least, -torch.inf)
        return logits

    def choose(self, logits: Tensor, noise: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """Return tokens [B, 1] (int64) for `logits` [B, V].

        noise [B, V] holds independent draws from the exponential distribution, needed if `draws`: of exponential
        variables with the rates p, the smallest is the i-th with probability p_i. Drawn outside, it gives the same
        tokens with and without compilation, and no random state has to be captured.
        """
        scores = self.scores(logits.float(), seen)
        if self.draws:
            assert noise is not None
            # A draw of 0 would make scores of -inf undefined.
            scores = scores - noise.clamp_min(torch.finfo(noise.dtype).tiny).log()
        return scores.argmax(-1, keepdim=True)
