"""Logits as the kernels that choose a token see them, and how a token is drawn from them."""

# The jitted functions are written in Triton's language, which is not quite Python.
# mypy: ignore-errors

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

_WORST = tl.constexpr(-float("inf"))


@dataclass(frozen=True)
class Filters:
    """How tokens are drawn, as `Sampling` has it; None leaves a filter out, and `draw` False takes the likeliest."""

    draw: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    penalty: float | None = None


@triton.jit
def penalised(logits, seen, v, V, penalty, REPEAT: tl.constexpr):
    """Logits `v` in fp32 after the repetition penalty; -inf beyond the end."""
    x = tl.load(logits + v, mask=v < V, other=_WORST).to(tl.float32)
    if REPEAT:
        there = tl.load(seen + v, mask=v < V, other=0) != 0
        x = tl.where(there, tl.where(x > 0, x / penalty, x * penalty), x)
    return x


@triton.jit
def key_of(x):
    """Integers in the order of the floats; 0 and -0 are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
