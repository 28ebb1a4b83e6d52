"""Which tokens may be chosen by logits that are known up to rounding.

Two ways to compute the same logits sum in another order, and where two tokens are almost as likely the texts part: of
some hundred tokens of a random model, about one run in a thousand has such a place. So tests do not ask for the same
tokens; they ask of every token whether logits that differ from the reference's by no more than rounding choose it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hqq.models.generation.sampling import Sampling

# The roundings of a float32's operation, and what logarithms and quotients of numbers below 2^5 lose to it.
UNIT = 2.0**-24
_ARITHMETIC = 2**6 * UNIT


def rounding_slack(logits: Tensor, unit: float = UNIT, blocks: int = 2) -> float:
    """How far logits of a model of so many blocks may be from the same logits summed in another order.

    Norms, products, scores and weighted sums make some 8 sums in a row in each block, of about 128 terms on average,
    in both computations. Roundings are independent of each other and fall either way, so n of them add up to the root
    of n times `unit` of the numbers' size; six times that is exceeded once in 10^9 logits.
    """
    return 6 * (2 * blocks * 8 * 128) ** 0.5 * unit * float(logits.abs().max())


def may_choose(
    sampling: Sampling,
    logits: Tensor,
    token: int,
    slack: float,
    noise: Tensor | None = None,
    seen: Tensor | None = None,
) -> bool:
    """Whether logits [V] that are nowhere further than `slack` from these may make `sampling` choose `token`.

    noise, seen [V]: as in `Sampling.choose`. The filters are written anew here, in float64: a token stays for certain
    if no such logits drop it, and is out for certain if all of them do.
    """
    x, slack = logits.double().cpu(), slack + _ARITHMETIC
    if sampling.remembers and seen is not None:
        penalty = sampling.repetition_penalty
        assert penalty is not None
        x = torch.where(seen.cpu(), torch.where(x > 0, x / penalty, x * penalty), x)
        slack *= max(penalty, 1 / penalty)
    keys, stays, may_stay = x, x > -torch.inf, x > -torch.inf
    if sampling.draws:
        assert noise is not None
        x, slack = x / sampling.temperature, slack / sampling.temperature
        stays, may_stay = _filtered(sampling, x, 2 * slack)
        keys = x - noise.double().cpu().clamp_min(torch.finfo(torch.float32).tiny).log()
    return bool(may_stay[token]) and bool(
        keys[token] + 2 * slack >= keys.masked_fill(~stays, -torch.inf).max()
    )


def _filtered(sampling: Sampling, x: Tensor, apart: float) -> tuple[Tensor, Tensor]:
    """Return which tokens top-k, top-p and min-p keep for certain, and which they may keep.

    apart: up to this difference either of two logits may be the larger one.
    """
    stays, may_stay = x > -torch.inf, x > -torch.inf
    ordered = x.sort(descending=True).values
    # How many tokens are larger for certain, and how many others may be.
    larger = torch.searchsorted(-ordered, -(x + apart), right=False)
    may_be_larger = torch.searchsorted(-ordered, -(x - apart), right=True) - 1
    if sampling.top_k is not None and sampling.top_k < len(x):
        stays, may_stay = stays & (may_be_larger < sampling.top_k), may_stay & (larger < sampling.top_k)
        ordered = ordered[: sampling.top_k]
        larger, may_be_larger = larger.clamp_max(len(ordered)), may_be_larger.clamp_max(len(ordered))
    if sampling.top_p is not None and sampling.top_p < 1:
        masses = torch.cat((x.new_zeros(1), ordered.softmax(0).cumsum(0)))
        # The larger tokens' share is off by `apart` of itself, and by the roundings of a sum of them in float32.
        off = 2 * apart + len(x) * UNIT
        may_stay = may_stay & (masses[larger] * (1 - off) - off < sampling.top_p)
        stays = stays & (masses[may_be_larger] * (1 + off) + off < sampling.top_p)
    if sampling.min_p:
        least = ordered[0] + torch.tensor(sampling.min_p, dtype=x.dtype).log()
        stays, may_stay = stays & (x - apart >= least), may_stay & (x + apart >= least)
    # The likeliest token stays whatever the settings.
    return stays | (may_be_larger == 0), may_stay


@torch.no_grad()
def check_texts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    seed: int | None = None,
) -> None:
    """Assert that each text [tokens] goes on after its prompt as `sampling` makes the model's own forward pass go on.

    Every token is judged by the logits after those before it, from one pass over prompt and text. The texts are one
    batch; seed: what its draws came from, one for each row and token of the vocabulary at each step.
    """
    sampling = Sampling() if sampling is None else sampling
    device = next(model.parameters()).device
    after = [
        _logits(model, [*prompt, *text], len(prompt), device)
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    generator = torch.Generator(device)
    if seed is not None:
        generator.manual_seed(seed)
    noise = torch.ones(len(texts), after[0].shape[-1], device=device)
    for place in range(max(map(len, texts))):
        if sampling.draws:
            noise.exponential_(generator=generator)
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            if place < len(text):
                logits = after[row][place]
                seen = torch.zeros(len(logits), dtype=torch.bool)
                seen[[*prompt, *text[:place]]] = True
                allowed = may_choose(sampling, logits, text[place], rounding_slack(logits), noise[row], seen)
                assert allowed, (row, place, text[place], int(logits.argmax()))


def _logits(model: Any, ids: list[int], begin: int, device: torch.device) -> Tensor:
    """Return the logits [tokens, V] by which the tokens from `begin` on are chosen."""
    logits: Tensor = model(torch.tensor([ids[:-1]], device=device), use_cache=False).logits[0, begin - 1 :]
    return logits.float()
